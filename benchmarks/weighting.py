"""The weighting alone: `bilevel_reweight` on a stack, and eq. (10) as one writes it down."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

import optax_bilevel
from benchmarks.timing import compare

LAM, MU = 1.0, 0.01


def rule(solver: Literal["diagonal", "exact"] = "diagonal") -> Callable[[jax.Array], Any]:
    """The library's weighting of a stack, as a function of it."""
    transformation = optax_bilevel.bilevel_reweight(LAM, MU, solver=solver)

    def weighting(stack: jax.Array) -> Any:
        return transformation.update(stack, transformation.init(stack[0]))[0]

    return weighting


def by_hand(stack: jax.Array) -> jax.Array:
    """Eq. (10) in `jax.numpy`, in float32."""
    validation, grads = stack[0].astype(jnp.float32), stack[1:].astype(jnp.float32)
    omega = grads @ validation / (jnp.sum(jnp.square(grads), axis=1) / LAM + MU)
    return (omega / jnp.sum(jnp.abs(omega)) @ grads).astype(stack.dtype)


def measure(dtype: Any, k: int = 8, size: int = 10_000_000, rounds: int = 9) -> dict[str, float]:
    """Seconds of both on a stack [k, size], and their ratio."""
    stack = jax.random.normal(jax.random.key(0), (k, size), jnp.float32).astype(dtype)
    timings = compare({"weighting": rule(), "by_hand": by_hand}, (stack,), rounds)
    seconds = {name: timing.seconds for name, timing in timings.items()}
    return {**seconds, "ratio": seconds["weighting"] / seconds["by_hand"]}
