"""The collective form: one mini-batch per device, the traffic of an ordinary all-reduce.

Instead of sending the validation gradient to everyone and then reducing (two gradients' worth of
traffic), devices exchange shards: each gets one shard of all k gradients (all-to-all), computes
that shard's part of the inner products, adds the parts up (a psum of a few scalars per mini-batch),
forms the weighted sum of its shard and gathers the shards of the others (all-gather). The two
exchanges move the bytes of the reduce-scatter and the all-gather that an all-reduce consists of.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from optax_bilevel import _mesh, _rule, _shards, _tree, _validate
from optax_bilevel._mesh import AxisName
from optax_bilevel._tree import Groups, PyTree


def bilevel_pmean(
    grads: PyTree,
    axis_name: AxisName,
    lam: ArrayLike = 1.0,
    mu: ArrayLike = 0.01,
    *,
    num_validation: int = 1,
    solver: Literal["diagonal", "exact"] = "diagonal",
    normalize: bool = True,
    nonnegative: bool = False,
    groups: Groups = None,
    example_axis: AxisName | None = None,
) -> PyTree:
    r"""Stands where ``jax.lax.pmean(grads, axis_name)`` stood, and returns the reweighted gradient.

    Every device along `axis_name` brings the gradient of its own mini-batch; the first
    `num_validation` devices hold the validation mini-batches. All devices get
    :math:`\sum_i\hat\omega_i g_i` of eq. (10) or (8). Moves as many bytes as `jax.lax.pmean` does,
    and holds two gradient-sized buffers beside the gradient. Works inside `jax.shard_map` and
    `jax.pmap`. `bilevel_pmean_and_weights` gives ω̂ as well.

    Args:
        grads: this device's gradients, leaves [\*shape].
        axis_name: the axis (or tuple of axes) along which there is one mini-batch per device, k of
            them.
        lam, mu, num_validation, solver, normalize, nonnegative, groups: as in `bilevel_reweight`.
        example_axis: a second axis (or tuple) over which the examples of one mini-batch are spread;
            the gradients are averaged over it, without extra traffic.

    Returns:
        Reweighted gradients, leaves [\*shape] of the dtypes of `grads`, the same on every device.

    Raises:
        ValueError: at trace time for a hyper-parameter out of range, k ≤ num_validation, a leaf
            that is not floating point, and, inside `jax.shard_map`, for a gradient that is already
            the same on all devices.

    Warning:
        `jax.shard_map` (with its default ``check_vma=True``) sums gradients with respect to
        *replicated* parameters over all devices by itself, so that the mini-batches can no longer
        be told apart. Differentiate with respect to
        ``jax.lax.pcast(params, axis_name, to="varying")``; anything else is an error here.

    Example:
        >>> import jax, jax.numpy as jnp, optax_bilevel
        >>> from jax.sharding import NamedSharding, PartitionSpec as P
        >>> k = jax.device_count()  # one mini-batch per device
        >>> mesh = jax.make_mesh((k,), ("batch",))
        >>> def grad_step(params, batch):
        ...     params = jax.lax.pcast(params, "batch", to="varying")
        ...     grads = jax.grad(lambda w: jnp.mean((batch[0] @ w) ** 2))(params)
        ...     return optax_bilevel.bilevel_pmean(grads, "batch")
        >>> step = jax.jit(jax.shard_map(grad_step, mesh=mesh,
        ...                              in_specs=(P(), P("batch")), out_specs=P()))
        >>> batches = jax.device_put(jnp.ones((k, 4, 3)), NamedSharding(mesh, P("batch")))
        >>> if k > 1:
        ...     grads = step(jnp.ones(3), batches)
    """
    reweighted, _ = bilevel_pmean_and_weights(
        grads,
        axis_name,
        lam,
        mu,
        num_validation=num_validation,
        solver=solver,
        normalize=normalize,
        nonnegative=nonnegative,
        groups=groups,
        example_axis=example_axis,
    )
    return reweighted


def bilevel_pmean_and_weights(
    grads: PyTree,
    axis_name: AxisName,
    lam: ArrayLike = 1.0,
    mu: ArrayLike = 0.01,
    *,
    num_validation: int = 1,
    solver: Literal["diagonal", "exact"] = "diagonal",
    normalize: bool = True,
    nonnegative: bool = False,
    groups: Groups = None,
    example_axis: AxisName | None = None,
) -> tuple[PyTree, jax.Array]:
    r"""What `bilevel_pmean` gives, with the weights, which cost nothing more.

    Args:
        grads, axis_name, lam, mu: as in `bilevel_pmean`, and so are the options.

    Returns:
        The reweighted gradients, and ω̂, [k] with validation slots 0 or [groups, k], float32 or
        wider; both the same on every device.

    Raises:
        ValueError: as `bilevel_pmean`.
    """
    rule = _validate.rule(lam, mu, num_validation, groups, solver, normalize, nonnegative)
    _validate.no_masked(grads)
    _validate.inexact(grads)
    everywhere = _mesh.axes_of(axis_name)
    if example_axis is not None:
        everywhere += _mesh.axes_of(example_axis)
    _validate.varying(grads, everywhere)
    k = jax.lax.axis_size(axis_name)
    _validate.enough(
        f"axis {axis_name!r} has {k} devices, one mini-batch each, which", k, num_validation
    )
    grouping = _tree.resolve_groups(grads, groups)
    if not jax.tree.leaves(grads):
        return grads, grouping.present(jnp.zeros((grouping.num_groups, k)))

    spread = 1 if example_axis is None else jax.lax.axis_size(example_axis)
    stacked = _shards.exchange(grads, everywhere, spread)
    products = _tree.stack_products(stacked, grouping, num_validation, with_gram=solver == "exact")
    weights = _rule.weigh(jax.lax.psum(products, everywhere), rule)
    sums = _tree.weighted_sum(stacked, weights.values, grouping, held_out=num_validation)
    return _shards.gather(sums, grads, everywhere), grouping.present(weights.values)
