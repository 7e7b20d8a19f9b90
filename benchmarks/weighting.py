"""The weighting alone, against the physical limit: reading the stack twice and writing once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import optax_bilevel
from benchmarks.timing import compare
from optax_bilevel import _inner_products

LAM, MU = 1.0, 0.01


def rule(solver: str = "diagonal") -> Callable[[jax.Array], Any]:
    """The library's weighting of a stack, as a function of it."""
    transformation = optax_bilevel.bilevel_reweight(LAM, MU, solver=solver)

    def weighting(stack: jax.Array) -> Any:
        return transformation.update(stack, transformation.init(stack[0]))[0]

    return weighting


def measure(dtype: Any, k: int = 8, size: int = 10_000_000, rounds: int = 9) -> dict[str, float]:
    """Seconds of the weighting of a stack [k, size], and what to hold against them.

    The limit of memory is made of the simplest reductions: a sum over the stack, twice, and a copy
    of a gradient. Beside it: "sum", the last of the rule's three sums over the stack (Σ v·g_i,
    Σ g_i·g_i, Σ ω_i g_i) for weights that are known; "by_hand", the rule as one writes it down in
    float32.
    """
    stack = jax.random.normal(jax.random.key(0), (k, size), jnp.float32).astype(dtype)
    omega = jnp.linspace(0.1, 1.0, k)[None]

    def weighted_sum(stack: jax.Array) -> Any:
        grouping = _inner_products.resolve_groups(stack, None)
        return _inner_products.weighted_sum(stack, omega, grouping, held_out=1).astype(stack.dtype)

    def read(stack: jax.Array) -> jax.Array:
        return jnp.sum(stack, dtype=jnp.float32)

    def write(stack: jax.Array) -> jax.Array:
        return stack[0] + 1

    def by_hand(stack: jax.Array) -> jax.Array:
        validation, grads = stack[0].astype(jnp.float32), stack[1:].astype(jnp.float32)
        omega = grads @ validation / (jnp.sum(jnp.square(grads), axis=1) / LAM + MU)
        return (omega / jnp.sum(jnp.abs(omega)) @ grads).astype(stack.dtype)

    timings = compare(
        {"weighting": rule(), "sum": weighted_sum, "read": read, "write": write},
        (stack,),
        rounds,
    )
    # By itself: it fills the caches and gives back hundreds of megabytes after each call.
    timings |= compare({"by_hand": by_hand}, (stack,), rounds)
    # `write` also reads a gradient, a k-th of what `read` does.
    written = max(timings["write"].seconds - timings["read"].seconds / k, 0.0)
    limit = 2 * timings["read"].seconds + written
    seconds = {name: timings[name].seconds for name in ("weighting", "sum", "by_hand")}
    processor = timings["weighting"].processor_seconds
    ratio = seconds["weighting"] / limit
    return {**seconds, "processor": processor, "limit": limit, "ratio": ratio}
