"""The weighting alone, against the physical limit: reading the stack twice and writing once."""

from typing import Any

import jax
import jax.numpy as jnp

import optax_bilevel
from benchmarks.timing import compare


def measure(dtype: Any, k: int = 8, size: int = 10_000_000, rounds: int = 9) -> dict[str, float]:
    """Seconds of the weighting of a stack [k, size], and of the limit.

    The limit is made of the simplest reductions: a sum over the stack, twice, and a copy of a
    gradient.
    """
    stack = jax.random.normal(jax.random.key(0), (k, size), jnp.float32).astype(dtype)
    rule = optax_bilevel.bilevel_reweight()

    def weighting(stack: jax.Array) -> Any:
        return rule.update(stack, rule.init(stack[0]))[0]

    def read(stack: jax.Array) -> jax.Array:
        return jnp.sum(stack, dtype=jnp.float32)

    def write(stack: jax.Array) -> jax.Array:
        return stack[0] + 1

    timings = compare({"weighting": weighting, "read": read, "write": write}, (stack,), rounds)
    # `write` also reads a gradient, a k-th of what `read` does.
    written = max(timings["write"].seconds - timings["read"].seconds / k, 0.0)
    limit = 2 * timings["read"].seconds + written
    return {
        "weighting": timings["weighting"].seconds,
        "limit": limit,
        "ratio": timings["weighting"].seconds / limit,
    }
