"""Several processes of ``python -m train run --distributed``, with gloo over loopback.

They are forked from a server that has imported everything, which saves each of them seconds; what
runs in them is the command line's own code.
"""

import contextlib
import multiprocessing
import os
import pathlib
import signal
import socket
import time
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train.__main__", "train.trainer", "tests.train.processes"])


def start(
    directory: Any, flags: list[Any], processes: int, devices: int, at_step: Any = None
) -> list[Any]:
    """Starts all processes of a run.

    Args:
        directory: the run directory; the processes' output is written beside it.
        flags: of ``python -m train run``, or those of each process.
        processes: how many.
        devices: fake devices of each.
        at_step: (process, step, signal): what one of them sends itself after that step.
    """
    with contextlib.closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for number in range(processes):
        own = flags[number] if isinstance(flags[0], list) else flags
        args = ["run", "--out", str(directory), *own, "--no-tensorboard"]
        if processes > 1:
            args += ["--distributed", "--coordinator", f"localhost:{port}"]
            args += ["--num-processes", str(processes), "--process-id", str(number)]
        mine = at_step[1:] if at_step and at_step[0] == number else None
        process = CONTEXT.Process(
            target=_run, args=(args, log(directory, number), devices, mine), daemon=True
        )
        process.start()
        started.append(process)
    return started


def log(directory: Any, number: int) -> pathlib.Path:
    directory = pathlib.Path(directory)
    return directory.parent / f"{directory.name}-process-{number}.log"


def end(directory: Any, processes: list[Any], seconds: float) -> tuple[list[int], list[str]]:
    """Exit codes and outputs; a process that has not ended in time has -1."""
    until = time.monotonic() + seconds
    codes = []
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        codes.append(-1 if process.exitcode is None else process.exitcode)
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes, [log(directory, number).read_text() for number in range(len(processes))]


def run(directory: Any, flags: list[str], processes: int, devices: int) -> None:
    """Trains to the end."""
    codes, outputs = end(directory, start(directory, flags, processes, devices), 240)
    assert codes == [0] * processes, "\n".join(outputs)


def _run(args: list[str], file: pathlib.Path, devices: int, at_step: Any) -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import sys

    from train import __main__ as cli
    from train import loop

    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    if at_step is not None:
        step, signum = at_step
        advance = loop.advance

        def advance_and_send(*args: Any) -> Any:
            result = advance(*args)
            if int(result[0].step) == step:
                os.kill(os.getpid(), signum)
                time.sleep(0.2 if signum != signal.SIGKILL else 60)
            return result

        loop.advance = advance_and_send
    sys.exit(cli.main(args))
