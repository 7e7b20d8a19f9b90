"""SIGTERM and Ctrl-C ask a training to stop; it saves first."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

from train import distributed


class Interrupted(Exception):  # noqa: N818, not an error: the run can go on
    """The run was asked to stop and has saved its state; `signum` says by what."""

    def __init__(self, signum: int, step: int):
        """Names the signal and the step that was saved."""
        super().__init__(f"{signal.Signals(signum).name} at step {step}; start again to go on")
        self.signum = signum


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], int | None]]:
    """Within, SIGTERM and SIGINT only set what the yielded function of the step returns.

    Once `jax.distributed` has been initialized JAX itself catches SIGTERM, of whichever process,
    and all agree on the step at which they stop. SIGINT then counts as SIGTERM.
    """
    received: list[int] = []
    previous = {}
    several = distributed.is_initialized()
    handlers: dict[int, Any] = {
        signum: lambda number, _: received.append(number)
        for signum in (signal.SIGTERM, signal.SIGINT)
    }
    if several:
        handlers = {signal.SIGINT: lambda number, _: signal.raise_signal(signal.SIGTERM)}
    with contextlib.suppress(ValueError):  # not the main thread: signals stay as they are
        for signum, handler in handlers.items():
            previous[signum] = signal.signal(signum, handler)

    def asked_to_stop(step: int) -> int | None:
        if several:
            return signal.SIGTERM if distributed.preempted(step) else None
        return received[0] if received else None

    try:
        yield asked_to_stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
