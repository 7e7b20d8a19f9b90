"""The weighting alone, against the limits of memory (two reads, one write) and of arithmetic."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import optax_bilevel
from benchmarks.timing import compare

# Columns of the stack that are summed again and again: half a MiB in float32, which caches hold.
_PIECE = 1 << 14


def measure(dtype: Any, k: int = 8, size: int = 10_000_000, rounds: int = 9) -> dict[str, float]:
    """Seconds of the weighting of a stack [k, size], and of the limits.

    The limit of memory is made of the simplest reductions: a sum over the stack, twice, and a copy
    of a gradient. "arithmetic" is what XLA makes of the rule's sums as they stand on paper, each in
    float32: Σ v·g_i, Σ g_i·g_i, and Σ ω_i g_i for weights that are known. "cached", on a CPU, is
    what the same sums take of as many elements when none come from memory: column by column, of
    the same few columns again and again.
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

    def cached(stack: jax.Array, add: Any, rows: int) -> Any:
        width = min(_PIECE, size)

        def again(_: Any, totals: Any) -> Any:
            # Behind the barrier, or XLA would see that every pass takes the same.
            piece, totals = jax.lax.optimization_barrier((stack[:, :width], totals))
            return add(piece.astype(jnp.float32), totals)

        zeros = jnp.zeros((rows, width), jnp.float32)
        return jax.lax.fori_loop(0, size // width, again, (zeros, zeros))

    def add_products(x: jax.Array, totals: Any) -> Any:
        return totals[0] + x * x[:1], totals[1] + x * x

    def add_weighted(x: jax.Array, totals: Any) -> Any:
        return sum((x[i : i + 1] / (i + 1) for i in range(k)), totals[0]), totals[1]

    candidates = {"weighting": weighting, "read": read, "write": write}
    if jax.default_backend() == "cpu":  # on a GPU its passes would be too short for their launches
        candidates["cached_products"] = functools.partial(cached, add=add_products, rows=k)
        candidates["cached_sum"] = functools.partial(cached, add=add_weighted, rows=1)
    sums = {"products": products, "squares": squares, "combine": combine}
    timings = compare(candidates | sums, (stack,), rounds)
    # `write` also reads a gradient, a k-th of what `read` does.
    written = max(timings["write"].seconds - timings["read"].seconds / k, 0.0)
    limit = 2 * timings["read"].seconds + written
    from_cache = [t.seconds for name, t in timings.items() if name.startswith("cached")]
    return {
        "weighting": timings["weighting"].seconds,
        "limit": limit,
        "arithmetic": sum(timings[name].seconds for name in sums),
        "ratio": timings["weighting"].seconds / limit,
        **({"cached": sum(from_cache)} if from_cache else {}),
    }
