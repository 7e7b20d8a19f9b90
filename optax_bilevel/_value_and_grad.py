"""The streaming form: the same update, gradient memory constant in k.

Once the validation gradient is known, each ω_i of eq. (10) needs its own gradient alone, and the
normalisation is one division at the end: keep Σ_j g_j and Σ_i ω_i g_i, and let every g_i go.

With mini-batches spread over devices, each streams its own, and Σ_i ω_i g_i is added up over the
devices once. The validation gradient would be a second gradient's worth of traffic: every device
computes it for itself, in the time in which it would have waited for it.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_bilevel import _factored, _mesh, _rule, _tree, _validate
from optax_bilevel._mesh import AxisName
from optax_bilevel._tree import Groups, PyTree

_SMALL = 1 << 20  # entries of gradients that are not worth saving: 4 MiB in float32


def bilevel_value_and_grad(
    loss_fn: Callable[..., Any],
    lam: ArrayLike = 1.0,
    mu: ArrayLike = 0.01,
    *,
    has_aux: bool = False,
    num_validation: int = 1,
    normalize: bool = True,
    nonnegative: bool = False,
    groups: Groups = None,
    microbatch_size: int | None = None,
    axis_name: AxisName | None = None,
) -> Callable[[PyTree, PyTree], tuple[Any, PyTree, jax.Array]]:
    """Like `jax.value_and_grad`, over k mini-batches, giving the reweighted gradient.

    Computes what `jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))` followed by `bilevel_reweight`
    computes by eq. (10), without ever holding k gradients: beside those at hand there are the
    validation gradient and the weighted sum, whatever k is. Gradients of dense layers on few
    examples are not formed at all.

    Args:
        loss_fn: ``loss_fn(params, batch) -> loss``, or ``-> (loss, aux)`` with `has_aux`;
            `batch` is one slice of `batches`, the loss a real scalar, the mini-batch's mean.
        lam, mu, num_validation, normalize, nonnegative, groups: as in `bilevel_reweight`.
        has_aux: whether `loss_fn` also returns auxiliary data, such as batch statistics.
        microbatch_size: how many mini-batches to differentiate at a time, one chunk after the
            other. None leaves it to the library, which takes all that fit into about the memory of
            three gradients; on CPU, where XLA runs the gradients of convolutions ten times slower
            inside a loop, it unrolls those, and XLA may then hold several mini-batches at once. A
            number keeps memory constant in k everywhere.
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

    Raises:
        ValueError: at construction for a hyper-parameter out of range; at trace time for leaves of
            `batches` that do not share their leading axis, for k ≤ num_validation, and with
            `axis_name` for leaves without this device's own part.

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
    rule = _validate.rule(lam, mu, num_validation, groups, "diagonal", normalize, nonnegative)
    if microbatch_size is not None:
        _validate.at_least("microbatch_size", microbatch_size, 1)
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=has_aux)

    def reweighted(params: PyTree, batches: PyTree) -> tuple[Any, PyTree, jax.Array]:
        end = _validate.batches(params, batches, num_validation)
        grouping = _tree.resolve_groups(params, groups)
        own, k, first = end - num_validation, end, 0
        if axis_name is not None:
            # Or shard_map would add up the gradients over the devices, each time.
            params = _mesh.vary(params, axis_name)
            devices = jax.lax.axis_size(axis_name)
            k, first = own * devices, own * jax.lax.axis_index(axis_name)
            _validate.enough(f"{devices} devices of {own} mini-batches each", k, num_validation)
        plan = _plan(loss_fn, value_and_grad, params, batches, end, microbatch_size)

        def differentiate(start: Any, size: int) -> tuple[Any, PyTree]:
            return _differentiate(value_and_grad, params, batches, start, size)

        if plan.size >= end and axis_name is None:
            values, stack = differentiate(0, end)
            products = _tree.stack_products(stack, grouping, num_validation, with_gram=False)
            weights = _rule.weigh(products, rule)
            total = _tree.weighted_sum(stack, weights.values, grouping, held_out=num_validation)
            grads = jax.tree.map(lambda x, p: x.astype(p.dtype), total, params)
            return values, grads, grouping.present(weights.values)

        def validate(start: Any, size: int) -> tuple[PyTree, Any]:
            values, grads = differentiate(start, size)
            sq_norms = _tree.squared_norms(grads, grouping)
            record = values, jnp.zeros_like(sq_norms.T), sq_norms.T
            return _tree.validation_gradient(grads, size), record

        def train(start: Any, size: int) -> tuple[PyTree, Any]:
            values, grads = differentiate(start, size)
            dots = _tree.dots_with(grads, validation, grouping)
            sq_norms = _tree.squared_norms(grads, grouping)
            omega = _rule.diagonal_weights(dots, sq_norms, rule)
            if axis_name is not None:  # the first of all repeat the validation mini-batches
                place = first + start - num_validation + jnp.arange(size)
                omega = jnp.where(place[None] < num_validation, 0, omega)
            return _tree.weighted_sum(grads, omega, grouping), (values, dots.T, sq_norms.T)

        validation, records = _add_up(validate, 0, num_validation, plan._replace(unroll=True))
        total, more = _add_up(train, num_validation, end, plan)
        if axis_name is not None:
            records = []  # the validation mini-batches come again, on the first devices
        values, dots, sq_norms = jax.tree.map(lambda *x: jnp.concatenate(x), *records, *more)

        validation_sq_norm = _tree.squared_norm(validation, grouping)
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
        weights = _rule.weigh(_rule.Products(dots.T, sq_norms.T, validation_sq_norm), rule)
        grads = _tree.scale_and_cast(total, weights.scale, grouping, like=params)
        return values, grads, grouping.present(weights.values)

    return reweighted


class _Plan(NamedTuple):
    """How mini-batches are gone through: so many at a time, in a loop or unrolled."""

    size: int
    unroll: bool


def _plan(
    loss_fn: Callable[..., Any],
    value_and_grad: Callable[..., Any],
    params: PyTree,
    batches: PyTree,
    count: int,
    size: int | None,
) -> _Plan:
    if size is not None:
        return _Plan(size, unroll=False)
    if _mesh.is_explicit((params, batches)):
        return _Plan(1, unroll=False)  # the sharding of a product would have to be said
    batch = jax.tree.map(lambda x: x[:1], batches)
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and "conv_general_dilated[" in str(
        jax.make_jaxpr(loss_fn)(params, jax.tree.map(lambda x: x[0], batch))
    ):
        return _Plan(1, unroll=True)
    # One by one there are three gradients: one, the validation gradient and the sum. All at once
    # there is the sum beside theirs, those of dense layers as factors.
    gradients = jax.vmap(lambda *args: value_and_grad(*args)[1], in_axes=(None, 0))
    own = _factored.count_entries(gradients, params, batch)
    one = sum(x.size for x in jax.tree.leaves(params))
    if count * own <= max(2 * one, _SMALL):
        return _Plan(count, unroll=False)
    # One mini-batch does not fill an accelerator.
    return _Plan(max(one // (2 * own), 1 if on_cpu else min(4, count)), unroll=False)


def _differentiate(
    value_and_grad: Callable[..., Any], params: PyTree, batches: PyTree, start: Any, size: int
) -> tuple[Any, PyTree]:
    """Values and gradients of [start, start + size): stacks, or `Factored`."""
    if size == 1:
        batch = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, start, keepdims=False), batches
        )
        return jax.tree.map(lambda x: jnp.asarray(x)[None], value_and_grad(params, batch))
    chunk = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), batches)
    stacked = jax.vmap(value_and_grad, in_axes=(None, 0))
    if _mesh.is_explicit((params, chunk)):
        return stacked(params, chunk)
    return _factored.evaluate(stacked, params, chunk)


def _add_up(
    function: Callable[[Any, int], tuple[PyTree, Any]], begin: int, end: int, plan: _Plan
) -> tuple[PyTree, list[Any]]:
    """Adds up the first results of ``function(start, size)`` over [begin, end).

    Returns:
        the sum, and a list of the second results, whose leaves lead with the mini-batches.
    """
    total, records = None, []
    if not plan.unroll and (chunks := (end - begin) // plan.size) > 1:
        shape = jax.eval_shape(lambda: function(begin, plan.size)[0])
        # Over indices, not slices: slicing beforehand would copy the batches.
        total, record = jax.lax.scan(
            lambda total, start: _add(total, *function(start, plan.size)),
            jax.tree.map(jnp.zeros_like, shape),
            begin + plan.size * jnp.arange(chunks),
        )
        records.append(jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), record))
        begin += chunks * plan.size
    for start in range(begin, end, plan.size):
        total, record = _add(total, *function(start, min(plan.size, end - start)))
        records.append(record)
    return total, records


def _add(total: PyTree | None, part: PyTree, record: Any) -> tuple[PyTree, Any]:
    return part if total is None else jax.tree.map(operator.add, total, part), record
