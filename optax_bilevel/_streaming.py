"""The streaming form: the same update, gradient memory constant in k.

Once the validation gradient is known, each ω_i of eq. (10) needs its own gradient alone, and the
normalisation is one division at the end: keep Σ_j g_j and Σ_i ω_i g_i, and let every g_i go.

With mini-batches spread over devices, each streams its own, and Σ_i ω_i g_i is added up over the
devices once. The validation gradient would be a second gradient's worth of traffic: every device
computes it for itself, in the time in which it would have waited for it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_bilevel import _inner_products, _past, _rule
from optax_bilevel._inner_products import AxisName, Groups, PyTree
from optax_bilevel._stream import Stream


def bilevel_value_and_grad(
    loss_fn: Callable[..., Any],
    lam: Any = 1.0,
    mu: Any = 0.01,
    *,
    has_aux: bool = False,
    num_validation: int = 1,
    solver: str = "diagonal",
    normalize: bool = True,
    nonnegative: bool = False,
    groups: Groups = None,
    validation: str = "batch",
    decay: Any = None,
    guard: str | None = None,
    loop: str | None = None,
    chunk_size: int | None = 1,
    axis_name: AxisName | None = None,
) -> Callable[..., tuple[Any, ...]]:
    """Like `jax.value_and_grad`, over k mini-batches, giving the reweighted gradient.

    Computes what `jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))` followed by `bilevel_reweight`
    computes, without ever holding k gradients: beside the gradient at hand (or `chunk_size` of
    them) there are the validation gradient and the weighted sum, whatever k is. ``chunk_size=None``
    is the quicker where memory may depend on k: several times, for a network of dense layers.

    Args:
        loss_fn: ``loss_fn(params, batch) -> loss``, or ``-> (loss, aux)`` with `has_aux`;
            `batch` is one slice of `batches`, the loss a real scalar, the mini-batch's mean.
        lam, mu, num_validation, normalize, nonnegative, groups, validation, decay, guard: as in
            `bilevel_reweight`.
        has_aux: whether `loss_fn` also returns auxiliary data, such as batch statistics.
        solver: "diagonal" only; eq. (8) needs all gradients at once.
        loop: how the training mini-batches are run through: "scan" (one copy of the network,
            compiled once) or "unroll" (a copy per chunk). None takes "scan", but on CPU "unroll"
            for a loss with convolutions, which XLA runs ten times slower inside loops there.
        chunk_size: how many mini-batches to differentiate at a time, vectorised by `jax.vmap`;
            costs chunk_size gradient buffers in place of one, but for dense layers on few examples,
            whose gradients are then never formed. None takes all k if that needs about the memory
            of three gradients, as of networks that are mostly dense layers, and then takes about
            the time of one batch of all examples; or else as many as fit, at least one. For a
            loss with convolutions on CPU that is one, and layers whose gradients are large beside
            what they are made of, the last convolutions of a residual network on few examples, are
            summed up without forming them.
        axis_name: inside `jax.shard_map` or `jax.pmap`, the axis (or tuple of axes) over whose D
            devices the k = m·D mini-batches are spread in order, m on each. `batches` then leads
            with ``num_validation + m``: a copy of the validation mini-batches, the same on all
            devices, and this device's own m. The first device's own begin with the validation
            mini-batches once more (so do the next one's where num_validation > m). `params` are
            the same on all devices. Gradients are added up over the devices once: the traffic of
            `jax.lax.pmean` on gradients in float32, and 2k scalars.

    Returns:
        A function ``(params, batches) -> (value, grads, weights)``. Leaves of `batches` lead with
        k, validation mini-batches first; random keys, one per mini-batch, are ordinary leaves.
        `value` is the losses [k], or ``(losses, aux)`` with aux leaves [k, ...]; `grads` has the
        structure, shapes and dtypes of `params`; `weights` is ω̂ [k] with validation slots 0, or
        [groups, k]. A mini-batch with a NaN or an Inf in its gradient gets weight 0; a NaN or an
        Inf in the validation gradient gives zero gradients. With `axis_name` losses and aux are
        those of this device's own m mini-batches, [m] and [m, ...]; `grads` and `weights`, of all
        k, are the same on all devices.

        With ``validation="past"`` the function is ``(params, batches, past) -> (value, grads,
        weights, past)``, with ``past = init_past(params)`` before the first step: it has no state
        of its own. Beside the gradient at hand there are then the past, the sum of the gradients,
        and their weighted sum. With `axis_name`, `batches` leads with the device's own m, the past
        is the same on all devices, and both sums travel: twice the traffic of `jax.lax.pmean`.

    Raises:
        ValueError: at construction for a hyper-parameter out of range or ``solver="exact"``; at
            trace time for leaves of `batches` that do not share their leading axis, for
            k ≤ num_validation, with `axis_name` for leaves without this device's own part, and for
            a `past` that is not like `params`.

    Example:
        >>> import jax, jax.numpy as jnp, optax_bilevel
        >>> loss = lambda w, batch: jnp.mean((batch["x"] @ w - batch["y"]) ** 2)
        >>> batches = {"x": jnp.ones((4, 2, 3)), "y": jnp.ones((4, 2))}  # k = 4 mini-batches of 2
        >>> step = optax_bilevel.bilevel_value_and_grad(loss)
        >>> losses, grads, weights = step(jnp.zeros(3), batches)
        >>> losses.shape, grads.shape, weights.shape
        ((4,), (3,), (4,))

        Two mini-batches on each device:

        >>> from jax.sharding import AxisType, PartitionSpec as P
        >>> mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
        >>> batches = {"x": jnp.ones((2 * jax.device_count(), 2, 3)),
        ...            "y": jnp.ones((2 * jax.device_count(), 2))}
        >>> spread = optax_bilevel.bilevel_value_and_grad(loss, axis_name="batch")
        >>> def on_device(params, validation, own):
        ...     join = lambda v, x: jnp.concatenate([v, x])
        ...     return spread(params, jax.tree.map(join, validation, own))
        >>> step = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=(P(), P(), P("batch")),
        ...                              out_specs=(P("batch"), P(), P())))
        >>> losses, grads, weights = step(
        ...     jnp.zeros(3), jax.tree.map(lambda x: x[:1], batches), batches)
        >>> losses.shape == weights.shape == (2 * jax.device_count(),)
        True
    """
    rule = _rule.Rule(
        lam, mu, num_validation, solver, normalize, nonnegative, validation, decay, guard
    )
    rule.require_streamable(
        "bilevel_value_and_grad", "use bilevel_reweight or bilevel_pmean for it"
    )
    _inner_products.check_groups(groups)
    stream = Stream(loss_fn, has_aux, loop, chunk_size)

    def reweighted(
        params: PyTree, batches: PyTree, past: _past.Past | None = None
    ) -> tuple[Any, ...]:
        end = stream.check_inputs(params, batches, rule.held_out)
        _past.check(past, params, rule, "init_past(params)")
        has_past = _past.has_past(past)
        grouping = _inner_products.resolve_groups(params, groups)
        own, k, first = end - rule.held_out, end, 0
        if axis_name is not None:
            # Or shard_map would add up the gradients over the devices, each time.
            params = _inner_products.vary(params, axis_name)
            k, first = _share(own, rule.held_out, axis_name)
        chunks = stream.over(params, batches, among_themselves=past is None)
        if chunks.size >= end and past is None and axis_name is None:
            values, stack = chunks.differentiate(0, end)
            products = _inner_products.stack_products(
                stack, grouping, num_validation, with_gram=False
            )
            weights = _rule.weigh(products, rule)
            total = _inner_products.weighted_sum(
                stack, weights.values, grouping, held_out=num_validation
            )
            grads = jax.tree.map(lambda x, p: x.astype(p.dtype), total, params)
            return values, grads, grouping.present(weights.values)

        def validate(start: Any, size: int, one: Any) -> tuple[PyTree, Any]:
            values, grads = chunks.differentiate(start, size, one)
            sq_norms = _inner_products.squared_norms(grads, grouping)
            record = (values, jnp.zeros_like(sq_norms.T), sq_norms.T)
            return _inner_products.validation_gradient(grads, size), record

        def train(start: Any, size: int, one: Any) -> tuple[PyTree, Any]:
            values, grads = chunks.differentiate(start, size, one)
            dots = _inner_products.dots_with(grads, validation, grouping)
            sq_norms = _inner_products.squared_norms(grads, grouping)
            omega = _rule.diagonal_weights(dots, sq_norms, rule, has_past)
            if axis_name is not None:  # the first of all repeat the validation mini-batches
                place = first + start - rule.held_out + jnp.arange(size)
                omega = jnp.where(place[None] < rule.held_out, 0, omega)
            sums = {"weighted": _inner_products.weighted_sum(grads, omega, grouping)}
            if past is not None:
                sums["plain"] = _inner_products.finite_sum(grads, sq_norms, grouping)
            return sums, (values, dots.T, sq_norms.T)

        records = []
        if past is None:
            validation, records = chunks.add_up(validate, None, 0, num_validation, unroll=True)
            sums = {"weighted": validation}
        else:
            validation = past.average
            if axis_name is not None:
                validation = _inner_products.vary(validation, axis_name)
            sums = {"weighted": validation, "plain": validation}
        if axis_name is not None:
            records = []  # the validation mini-batches come again, on the first devices
        total, more = chunks.add_up(train, sums, rule.held_out, end)
        values, dots, sq_norms = jax.tree.map(lambda *x: jnp.concatenate(x), *records, *more)

        validation_sq_norm = _inner_products.squared_norm(validation, grouping)
        total = jax.tree.map(_inner_products.formed, total)
        if axis_name is not None:
            places = first + jnp.arange(own)
            dots, sq_norms = (
                jnp.zeros((k, x.shape[1]), x.dtype).at[places].set(x) for x in (dots, sq_norms)
            )
            # Every device has it; adding the first one's up tells the types that it is the same.
            validation_sq_norm = jnp.where(first == 0, validation_sq_norm, 0)
            total, dots, sq_norms, validation_sq_norm = jax.lax.psum(
                (total, dots, sq_norms, validation_sq_norm), axis_name
            )
        products = _rule.Products(dots.T, sq_norms.T, validation_sq_norm)
        weights = _rule.weigh(products, rule, has_past)
        grads = _inner_products.scale_and_cast(
            total["weighted"], weights.scale, grouping, like=params
        )
        result = (values, grads, grouping.present(weights.values))
        if past is None:
            return result
        return *result, _past.advance(past, total["plain"], products.sq_norms, rule)

    return reweighted


def _share(own: int, num_validation: int, axis_name: AxisName) -> tuple[int, jax.Array]:
    """k, and which of the k mini-batches this device's first is, int32 []."""
    devices = jax.lax.axis_size(axis_name)
    k = own * devices
    if k <= num_validation:
        raise ValueError(
            f"axis {axis_name!r} has {devices} devices of {own} mini-batches beside the "
            f"validation ones, k = {k}, and num_validation = {num_validation} leaves none to "
            f"train on: k must be at least {num_validation + 1}"
        )
    return k, own * jax.lax.axis_index(axis_name)
