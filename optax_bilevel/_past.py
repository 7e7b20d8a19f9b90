"""Validation by the past: g_v is an average of the mean gradients of earlier steps.

The paper holds out one of the k mini-batches of a step. Here all k train, and what validates them
is an exponential moving average of the *unweighted* mean gradients of the steps before: known
before the step begins, of examples that the step does not see, and with less noise than one
mini-batch has. This is not in the paper.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_bilevel import _inner_products, _rule
from optax_bilevel._inner_products import Grouping, PyTree


class Past(NamedTuple):
    r"""The average that validates; made by `init_past`, and carried from step to step.

    Attributes:
        average: :math:`a_t = \sum_{s\le t} (1-d)\,d^{\,t-s} m_s / w_t` of the mean gradients m_s of
            the steps so far, bias-corrected; leaves as the parameters' in float32 or wider.
        weight: :math:`w_t = \sum_{s\le t}(1-d)\,d^{\,t-s}`, float32 or wider []; 0 while there is
            no past.
    """

    average: PyTree
    weight: jax.Array


def init_past(params: PyTree, *, num_devices: int | None = None) -> Past:
    r"""The past before the first step: nothing.

    Args:
        params: parameters, arrays or abstract ones.
        num_devices: for `bilevel_pmean`, the number D of devices along all its axes.

    Returns:
        A `Past` with zeros of the parameters' shapes and sharding, float32 or wider. With
        `num_devices` every leaf is flat, padded, and cut into one row per device,
        [D, ceil(size / D)]: place it along the leading axis, so that a device holds 1/D of it.

    Example:
        >>> import jax.numpy as jnp, optax_bilevel
        >>> optax_bilevel.init_past({"w": jnp.ones((3, 5), jnp.bfloat16)}).average["w"].dtype
        dtype('float32')
        >>> optax_bilevel.init_past({"w": jnp.ones((3, 5))}, num_devices=8).average["w"].shape
        (8, 2)
    """
    weight = jnp.zeros((), _inner_products.products_dtype(params))
    if num_devices is None:
        weight = _inner_products.replicate_like(weight, params)
        return Past(_inner_products.wide_zeros(params), weight)

    def rows(x: Any) -> jax.Array:
        dtype = _inner_products.accumulation_dtype(x.dtype)
        return jnp.zeros((num_devices, math.ceil(x.size / num_devices)), dtype)

    return Past(jax.tree.map(rows, params), weight)


def has_past(past: Past | None) -> jax.Array | None:
    """Whether any step has entered the average, bool []; None without one."""
    return None if past is None else past.weight > 0


def advance(past: Past, total: PyTree, sq_norms: jax.Array, rule: _rule.Rule) -> Past:
    """The past with a step added to it.

    Args:
        past: of the steps before.
        total: Σ_i g_i over the finite mini-batches of the step, leaves as `past.average`.
        sq_norms: |g_i|² of all k, [groups, k].
        rule: gives the decay.
    """
    count = jnp.sum(_rule.finite(sq_norms))
    rate, weight = _rule.past_rate(past.weight, count, rule)
    return Past(_inner_products.move(past.average, total, count, rate), weight)


def advance_by_stack(
    past: Past, grads: PyTree, sq_norms: jax.Array, grouping: Grouping, rule: _rule.Rule
) -> Past:
    """The past with a step of k stacked gradients added to it, leaves [k, *shape]."""
    return advance(past, _inner_products.finite_sum(grads, sq_norms, grouping), sq_norms, rule)


def check(past: Any, shapes: PyTree, rule: _rule.Rule, remedy: str) -> None:
    """Raises ValueError where a `Past` is missing, superfluous, or not of these shapes.

    Args:
        past: what came.
        shapes: a tree of arrays or abstract arrays of the expected shapes.
        rule: says whether the past validates.
        remedy: how to make one.
    """
    if not rule.from_past:
        if past is not None:
            raise ValueError('past is for validation="past": pass that as well, or leave it out')
        return
    if not isinstance(past, Past):
        got = "None" if past is None else type(past).__name__
        raise ValueError(f'validation="past" needs the past, got {got}: make it by {remedy}')
    _inner_products.check_average(past.average, shapes, "past.average", f"make it by {remedy}")
