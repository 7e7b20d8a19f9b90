"""How much main memory this process has held."""

import contextlib
import pathlib
import resource
import sys


def reset_peak() -> None:
    """Lets `peak` start anew, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """The most main memory that this process has held at a time, in megabytes of 1e6 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
