"""Compile time by number of leaves, against the same rule written by hand.

``python -m benchmarks.compile_time`` takes two to three minutes.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

import optax_bilevel

_K, _SIZE = 4, 3


def measure(leaves: Iterable[int] = (300, 1000)) -> dict[int, float]:
    """Prints the seconds and returns what `bilevel_reweight` takes of them, by number of leaves.

    One compilation each, in seconds of CPU, tracing included: leaves of 3 numbers, of 4
    mini-batches.
    """
    tx = optax_bilevel.bilevel_reweight()

    def ours(grads: list[Any]) -> Any:
        return tx.update(grads, tx.init([]))[0]

    for rule in (_by_hand, ours):
        _seconds(rule, 2)  # what the first compilation of a process takes besides
    ratios = {}
    for count in leaves:
        by_hand, of_library = _seconds(_by_hand, count), _seconds(ours, count)
        ratios[count] = of_library / by_hand
        print(
            f"{count} leaves: {of_library:.1f} s, by hand {by_hand:.1f} s: {ratios[count]:.2f}",
            flush=True,
        )
    return ratios


def _by_hand(grads: list[jax.Array]) -> list[jax.Array]:
    """Eq. (10) with its normalisation, as one writes it for float32, without any case."""
    dots = sum(jnp.tensordot(g, g[0], g.ndim - 1) for g in grads)
    norms = sum(jnp.sum(jnp.square(g), axis=tuple(range(1, g.ndim))) for g in grads)
    omega = jnp.asarray(dots / (norms + 0.01)).at[0].set(0)
    omega = omega / jnp.sum(jnp.abs(omega))
    return [jnp.tensordot(omega, g, 1) for g in grads]


def _seconds(rule: Callable[..., Any], leaves: int) -> float:
    grads = [jax.ShapeDtypeStruct((_K, _SIZE), jnp.float32)] * leaves
    started = time.process_time()
    # A function of its own, so that nothing is found in a cache.
    jax.jit(lambda grads: rule(grads)).lower(grads).compile()
    return time.process_time() - started


if __name__ == "__main__":
    measure()
