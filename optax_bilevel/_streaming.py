"""The streaming form: the same update, gradient memory constant in k.

Once the validation gradient is known, each ω_i of eq. (10) needs its own gradient alone, and the
normalisation is one division at the end: keep Σ_j g_j and Σ_i ω_i g_i, and let every g_i go.

With mini-batches spread over devices, each streams its own, and Σ_i ω_i g_i is added up over the
devices once. The validation gradient would be a second gradient's worth of traffic: every device
computes it for itself, in the time in which it would have waited for it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_bilevel import _inner_products, _past, _rule
from optax_bilevel._inner_products import AxisName, Groups, PyTree

LOOPS = ("unroll", "scan")


class Stream(NamedTuple):
    """How mini-batches are gone through; see `bilevel_value_and_grad`.

    Attributes:
        loss_fn: ``loss_fn(params, batch)``, with auxiliary data or without.
        has_aux: whether it has.
        loop: "unroll", "scan", or None for the better of them.
        chunk_size: how many to differentiate at a time.
    """

    loss_fn: Callable[..., Any]
    has_aux: bool
    loop: str | None
    chunk_size: int

    def check(self) -> None:
        """Raises ValueError for an unknown loop and a chunk size out of range."""
        if self.loop is not None and self.loop not in LOOPS:
            raise ValueError(f"unknown loop {self.loop!r}; known: None, {', '.join(LOOPS)}")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be a positive integer, got {self.chunk_size}")

    def check_inputs(self, params: PyTree, batches: PyTree, num_validation: int) -> int:
        """How many mini-batches lead the leaves of `batches`, or ValueError."""
        count = _inner_products.leading_axis(batches, num_validation, what="batch")
        if not jax.tree.leaves(batches) or not jax.tree.leaves(params):
            raise ValueError("batches and params need at least one leaf each")
        return count

    def differentiate(self, params: PyTree, batches: PyTree) -> Callable[..., tuple[Any, PyTree]]:
        """``(start, size, one) -> values and gradients`` of [start, start + size), stacked."""
        value_and_grad = jax.value_and_grad(_held(self.loss_fn, self.has_aux), has_aux=self.has_aux)

        def differentiate(start: Any, size: int, one: Any) -> tuple[Any, PyTree]:
            if size > 1:
                chunk = jax.tree.map(
                    lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), batches
                )
                return jax.vmap(value_and_grad, in_axes=(None, 0, None))(params, chunk, one)
            batch = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, start, keepdims=False), batches
            )
            return jax.tree.map(lambda x: jnp.asarray(x)[None], value_and_grad(params, batch, one))

        return differentiate

    def unrolls(self, params: PyTree, batches: PyTree) -> bool:
        """Whether there is a copy of the network for every chunk."""
        return (self.loop or _best_loop(self.loss_fn, params, batches)) == "unroll"

    def add_up(
        self,
        function: Callable[[Any, int, Any], tuple[PyTree, Any]],
        like: PyTree,
        begin: int,
        end: int,
        *,
        unroll: bool,
    ) -> tuple[PyTree, list[Any]]:
        """Adds up the first results of ``function(start, size, one)`` over [begin, end).

        Args:
            function: of a chunk; its first result is like `like`, leaves of its second lead with
                the size of the chunk.
            like: a tree of arrays.
            begin, end: of the mini-batches, at least one.
            unroll: as `unrolls` has it.

        Returns:
            the sum, and a list of the second results.
        """
        total, records = None, []
        if not unroll and (chunks := (end - begin) // self.chunk_size) > 1:
            # Over indices, not slices: slicing beforehand would copy the batches.
            total, record = jax.lax.scan(
                lambda total, start: _add(total, *function(start, self.chunk_size, 1)),
                jax.tree.map(jnp.zeros_like, like),
                begin + self.chunk_size * jnp.arange(chunks),
            )
            records.append(jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), record))
            begin += chunks * self.chunk_size
        total, more = _accumulate(function, total, begin, end, self.chunk_size)
        return total, records + more


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
    chunk_size: int = 1,
    axis_name: AxisName | None = None,
) -> Callable[..., tuple[Any, ...]]:
    """Like `jax.value_and_grad`, over k mini-batches, giving the reweighted gradient.

    Computes what `jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))` followed by `bilevel_reweight`
    computes, without ever holding k gradients: beside the gradient at hand (or `chunk_size` of
    them) there are the validation gradient and the weighted sum, whatever k is.

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
            costs chunk_size gradient buffers in place of one.
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
    stream.check()

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
        unroll = stream.unrolls(params, batches)
        differentiate = stream.differentiate(params, batches)

        def validate(start: Any, size: int, one: Any) -> tuple[PyTree, Any]:
            values, grads = differentiate(start, size, one)
            sq_norms = _inner_products.squared_norms(grads, grouping)
            record = (values, jnp.zeros_like(sq_norms.T), sq_norms.T)
            return _inner_products.validation_gradient(grads, size), record

        def train(start: Any, size: int, one: Any) -> tuple[PyTree, Any]:
            values, grads = differentiate(start, size, one)
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
            validation, records = _accumulate(validate, None, 0, num_validation, chunk_size)
            sums = {"weighted": validation}
        else:
            validation = past.average
            if axis_name is not None:
                validation = _inner_products.vary(validation, axis_name)
            sums = {"weighted": validation, "plain": validation}
        if axis_name is not None:
            records = []  # the validation mini-batches come again, on the first devices
        total, more = stream.add_up(train, sums, rule.held_out, end, unroll=unroll)
        values, dots, sq_norms = jax.tree.map(lambda *x: jnp.concatenate(x), *records, *more)

        validation_sq_norm = _inner_products.squared_norm(validation, grouping)
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


def _best_loop(loss_fn: Callable[..., Any], params: PyTree, batches: PyTree) -> str:
    if jax.default_backend() != "cpu":
        return "scan"
    batch = jax.tree.map(lambda x: x[0], batches)
    convolves = "conv_general_dilated" in str(jax.make_jaxpr(loss_fn)(params, batch))
    return "unroll" if convolves else "scan"


def _add(total: PyTree | None, part: PyTree, record: Any) -> tuple[PyTree, Any]:
    return part if total is None else jax.tree.map(jnp.add, total, part), record


def _held(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """``loss_fn(params, batch)`` times `one`, without which its backward pass cannot start."""

    def held(params: PyTree, batch: PyTree, one: Any) -> Any:
        def hold(loss: PyTree) -> PyTree:
            return jax.tree.map(lambda x: x * jnp.asarray(one, jnp.result_type(x)), loss)

        result = loss_fn(params, batch)
        if has_aux and isinstance(result, tuple):
            return hold(result[0]), *result[1:]
        return hold(result)

    return held


def _accumulate(
    function: Callable[[Any, int, Any], tuple[PyTree, Any]],
    total: PyTree | None,
    begin: int,
    end: int,
    chunk_size: int,
) -> tuple[Any, list[Any]]:
    """Adds up the first results of ``function(start, size, one)`` over [begin, end), unrolled.

    XLA would start all mini-batches at once and hold all their gradients. Here a forward pass
    starts when the last mini-batch but one has been added up, beside the last one's backward pass
    to keep all cores busy; a backward pass, whose result is another gradient, when the last has.
    """
    records = []
    before, last = 0, 0 if total is None else _zero_after(total)
    for start in range(begin, end, chunk_size):
        size = min(chunk_size, end - start)
        total, record = _add(total, *function(start + before, size, 1 + last))
        before, last = last, _zero_after(total)
        records.append(record)
    return total, records


def _zero_after(total: PyTree) -> jax.Array:
    """A zero, int32 [], that is not known before every leaf of `total` is.

    An optimization barrier would not do: the CPU backend drops it before scheduling.
    """
    entries = [jnp.real(_inner_products.probe(x)) for x in jax.tree.leaves(total) if x.size]
    dependency = sum(jnp.abs(jnp.nan_to_num(x.astype(jnp.float32))) for x in entries)
    return jnp.minimum(dependency, 0).astype(jnp.int32)
