"""The collective form: one mini-batch per device, the traffic of an ordinary all-reduce.

Instead of sending the validation gradient to everyone and then reducing (two gradients' worth of
traffic), devices exchange shards: each gets one shard of all k gradients (all-to-all), computes
that shard's part of the inner products, adds the parts up (a psum of a few scalars per mini-batch),
forms the weighted sum of its shard and gathers the shards of the others (all-gather). The two
exchanges move the bytes of the reduce-scatter and the all-gather that an all-reduce consists of.
"""

from typing import Any

import jax
import jax.numpy as jnp

from optax_bilevel import _inner_products, _past, _rule, _shards
from optax_bilevel._inner_products import AxisName, Groups, PyTree


def bilevel_pmean(
    grads: PyTree,
    axis_name: AxisName,
    lam: Any = 1.0,
    mu: Any = 0.01,
    *,
    num_validation: int = 1,
    solver: str = "diagonal",
    normalize: bool = True,
    nonnegative: bool = False,
    groups: Groups = None,
    validation: str = "batch",
    decay: Any = None,
    guard: str | None = None,
    past: _past.Past | None = None,
    example_axis: AxisName | None = None,
    return_weights: bool = False,
) -> Any:
    r"""Stands where ``jax.lax.pmean(grads, axis_name)`` stood, and returns the reweighted gradient.

    Every device along `axis_name` brings the gradient of its own mini-batch; the first
    `num_validation` devices hold the validation mini-batches. All devices get
    Σ_i ω̂_i g_i of eq. (10) or (8). Moves as many bytes as `jax.lax.pmean` does, and holds two
    gradient-sized buffers beside the gradient. Works inside `jax.shard_map` and `jax.pmap`.

    Args:
        grads: this device's gradients, leaves [\*shape].
        axis_name: the axis (or tuple of axes) along which there is one mini-batch per device, k of
            them.
        lam, mu, num_validation, solver, normalize, nonnegative, groups, validation, decay, guard:
            as in `bilevel_reweight`.
        past: with ``validation="past"``, this device's part of it: its row of what
            ``init_past(params, num_devices=D)`` makes for the D devices along all axes. In
            `jax.shard_map` its spec is ``Past(P(axes), P())``, the axes those of `axis_name` and
            then of `example_axis`.
        example_axis: a second axis (or tuple) over which the examples of one mini-batch are spread;
            the gradients are averaged over it, without extra traffic.
        return_weights: also return ω̂.

    Returns:
        Reweighted gradients, leaves [\*shape] of the dtypes of `grads`, the same on every device;
        with `return_weights` a pair of them and ω̂, [k] or [groups, k]; with ``validation="past"``
        a tuple that ends with this device's part of the new past.

    Raises:
        ValueError: at trace time for a hyper-parameter out of range, k ≤ num_validation, a leaf
            that is not floating point, a `past` that is not this device's part, and, inside
            `jax.shard_map`, for a gradient that is already the same on all devices.

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
    rule = _rule.Rule(
        lam, mu, num_validation, solver, normalize, nonnegative, validation, decay, guard
    )
    _inner_products.check_groups(groups)
    _inner_products.check_masked(grads, allow_masked=False)
    _inner_products.check_inexact(grads)
    everywhere = _inner_products.axes_of(axis_name) + (
        () if example_axis is None else _inner_products.axes_of(example_axis)
    )
    _inner_products.check_varying(grads, everywhere)
    k = jax.lax.axis_size(axis_name)
    if k <= rule.held_out:
        raise ValueError(
            f"axis {axis_name!r} has {k} devices, one mini-batch each, and num_validation = "
            f"{num_validation} leaves none to train on: it needs at least {num_validation + 1}"
        )
    spread = 1 if example_axis is None else jax.lax.axis_size(example_axis)
    rows = None if past is None else _rows(past)
    _past.check(
        rows,
        jax.tree.map(
            lambda g: jax.ShapeDtypeStruct((_shards.width(g, k * spread),), g.dtype), grads
        ),
        rule,
        f"init_past(params, num_devices={k * spread}), a row for each device",
    )
    if not jax.tree.leaves(grads):
        return _results(grads, jnp.zeros((k,)) if return_weights else None, past)
    grouping = _inner_products.resolve_groups(grads, groups)

    stacked = _shards.exchange(grads, everywhere, spread)
    products = jax.lax.psum(
        _inner_products.stack_products(
            stacked,
            grouping,
            rule.held_out,
            with_gram=solver == "exact",
            past=None if rows is None else rows.average,
        ),
        everywhere,
    )
    weights = _rule.weigh(products, rule, _past.has_past(past))
    sums = _inner_products.weighted_sum(stacked, weights.values, grouping, held_out=rule.held_out)
    result = _shards.gather(sums, grads, everywhere)
    if past is not None and rows is not None:
        rows = _past.advance_by_stack(rows, stacked, products.sq_norms, grouping, rule)
        rows = rows._replace(
            average=jax.tree.map(lambda x, a: x.reshape(a.shape), rows.average, past.average)
        )
    presented = grouping.present(weights.values) if return_weights else None
    return _results(result, presented, rows)


def _results(grads: PyTree, weights: jax.Array | None, past: _past.Past | None) -> Any:
    results = (grads, *(x for x in (weights, past) if x is not None))
    return results if len(results) > 1 else grads


def _rows(past: Any) -> Any:
    """A device's part with flat leaves: shard_map leaves the split axis there, pmap does not."""
    if not isinstance(past, _past.Past):
        return past
    flat = jax.tree.map(lambda a: a.reshape(-1), past.average)
    return past._replace(average=flat)
