"""Timing as ratios within one run: candidates take turns, so that a drifting machine hits all."""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Timing(NamedTuple):
    """How one candidate fared.

    Attributes:
        seconds: median over the rounds.
        compile_seconds: tracing and compiling.
        first_seconds: the first call of the compiled program.
        temp_bytes: temporary memory of the compiled program.
    """

    seconds: float
    compile_seconds: float
    first_seconds: float
    temp_bytes: int


def temporary_bytes(compiled: Any) -> int:
    """Temporary memory of a compiled program, beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def turns(names: Iterable[str], rounds: int) -> Iterator[str]:
    """Every name once a round, in a new random order each; the same orders in every run."""
    rng = random.Random(0)
    order = list(names)
    for _ in range(rounds):
        rng.shuffle(order)
        yield from order


def compare(
    candidates: dict[str, Callable[..., Any]],
    arguments: tuple[Any, ...],
    rounds: int = 9,
    states: dict[str, Any] | None = None,
) -> dict[str, Timing]:
    """Compiles every candidate for the same arguments and times them in turns.

    A turn is a call that is not timed, and one that is: what went before it, and the memory that
    is still being given back, are then its own, as in a loop.

    Args:
        candidates: functions of `arguments`, by name.
        arguments: arrays on the device.
        rounds: how often each is timed; the median counts.
        states: by name, of candidates ``(state, *arguments) -> state``: each call goes on from the
            last, whose memory it takes.
    """
    compiled, compile_seconds, first_seconds = {}, {}, {}
    last: dict[str, tuple[Any, ...]] = dict.fromkeys(candidates, ())
    if states is not None:  # copies, for they will be donated
        last = {name: (jax.tree.map(jnp.copy, state),) for name, state in states.items()}

    def call(name: str) -> None:
        result = jax.block_until_ready(compiled[name](*last[name], *arguments))
        if states is not None:
            last[name] = (result,)

    for name, function in candidates.items():
        started = time.perf_counter()
        jitted = jax.jit(function, donate_argnums=() if states is None else 0)
        compiled[name] = jitted.lower(*last[name], *arguments).compile()
        compile_seconds[name] = time.perf_counter() - started
        started = time.perf_counter()
        call(name)
        first_seconds[name] = time.perf_counter() - started
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for name in turns(candidates, rounds):
        call(name)
        started = time.perf_counter()
        call(name)
        seconds[name].append(time.perf_counter() - started)
    return {
        name: Timing(
            statistics.median(seconds[name]),
            compile_seconds[name],
            first_seconds[name],
            temporary_bytes(compiled[name]),
        )
        for name in candidates
    }
