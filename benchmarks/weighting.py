"""The weighting alone, against the physical limit: reading the stack twice and writing once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import optax_bilevel
from benchmarks.timing import compare


def measure(dtype: Any, k: int = 8, size: int = 10_000_000, rounds: int = 9) -> dict[str, float]:
    """Seconds of the weighting of a stack [k, size], and of the limits.

    The limit of memory is made of the simplest reductions: a sum over the stack, twice, and a copy
    of a gradient. That of arithmetic is what XLA makes of the rule's sums as they stand on paper,
    each in float32: Σ v·g_i, Σ g_i·g_i, and Σ ω_i g_i for weights that are known.
    """
    stack = jax.random.normal(jax.random.key(0), (k, size), jnp.float32).astype(dtype)
    rule = optax_bilevel.bilevel_reweight()

    def weighting(stack: jax.Array) -> Any:
        return rule.update(stack, rule.init(stack[0]))[0]

    def read(stack: jax.Array) -> jax.Array:
        return jnp.sum(stack, dtype=jnp.float32)

    def write(stack: jax.Array) -> jax.Array:
        return stack[0] + 1

    def products(stack: jax.Array) -> jax.Array:
        wide = stack.astype(jnp.float32)
        return jnp.sum(wide * wide[:1], axis=1)

    def squares(stack: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(stack.astype(jnp.float32)), axis=1)

    def combine(stack: jax.Array) -> jax.Array:
        rows = (stack[i].astype(jnp.float32) / (i + 1) for i in range(k))
        return functools.reduce(jnp.add, rows).astype(stack.dtype)

    candidates = {"weighting": weighting, "read": read, "write": write}
    sums = {"products": products, "squares": squares, "combine": combine}
    timings = compare(candidates | sums, (stack,), rounds)
    # `write` also reads a gradient, a k-th of what `read` does.
    written = max(timings["write"].seconds - timings["read"].seconds / k, 0.0)
    limit = 2 * timings["read"].seconds + written
    return {
        "weighting": timings["weighting"].seconds,
        "limit": limit,
        "arithmetic": sum(timings[name].seconds for name in sums),
        "ratio": timings["weighting"].seconds / limit,
    }
