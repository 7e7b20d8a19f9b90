"""Several processes as one run, on JAX's coordination service.

Every process runs the same program. The first one writes what is not a checkpoint; all write
checkpoints. A process that dies takes the others with it: the service notices within
`HEARTBEAT_SECONDS`, and mostly a broken connection tells them at once.
"""

import os
import sys
import traceback
import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 20
"""After so many seconds without a sign of life a process counts as dead."""

_SHUTDOWN_SECONDS = 30


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins this process to the others; must come before anything else of JAX.

    Args:
        coordinator: HOST:PORT of the first process. None, as for the others, where JAX finds it
            out by itself: on TPU pods, under SLURM and Open MPI.
        num_processes: how many there are.
        process_id: which one this is, from 0.

    Raises:
        ValueError: if some of the three are given and others missing.
    """
    given = (coordinator is not None, num_processes is not None, process_id is not None)
    if any(given) and not all(given):
        raise ValueError(
            "give --coordinator, --num-processes and --process-id together, or none of them where "
            "the cluster is detected (TPU pods, SLURM, Open MPI)"
        )
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )


def is_initialized() -> bool:
    """Whether this process has joined others, if only as the one of one."""
    return jax.distributed.is_initialized()


def writes() -> bool:
    """Whether this process is the one that writes metrics and the like."""
    return jax.process_index() == 0


def check_alike(text: str, what: str) -> None:
    """Raises ValueError unless every process has the same text."""
    if jax.process_count() > 1:
        here = np.array(zlib.crc32(text.encode()), np.uint32)
        if (multihost_utils.process_allgather(here) != here).any():
            raise ValueError(f"the processes have different {what}: start all with the same one")


def of_first(value: bool) -> bool:
    """What the first process says; all have to ask."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def wait(name: str) -> None:
    """Until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def preempted(step: int) -> bool:
    """Whether some process has got SIGTERM and all have agreed to stop at this step.

    To be asked by all after every step.
    """
    return multihost_utils.reached_preemption_sync_point(step)


def explain(error: Exception) -> int:
    """Says on stderr what ended this process; returns the exit code."""
    if not isinstance(error, jax.errors.JaxRuntimeError):
        traceback.print_exception(error)
        return 1
    here = f"process {jax.process_index()} of {jax.process_count()}"
    why = str(error).partition("\n")[0]
    print(
        f"error: {here}: another process has ended or cannot be reached; start all of them again "
        f"to go on from the last checkpoint ({why})",
        file=sys.stderr,
    )
    return 5


def leave(code: int) -> None:
    """Ends this process without waiting for the others, as Python would at its exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
