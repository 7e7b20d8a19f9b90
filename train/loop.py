"""The training loop: step after step, an epoch's line of metrics, a checkpoint now and then."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from train import distributed, saved, sums
from train.checkpoints import Checkpoints
from train.config import Config
from train.evaluate import evaluate
from train.feed import feed
from train.problem import Problem
from train.program import Program
from train.run_directory import RunDirectory, RunDirectoryError
from train.signals import Interrupted
from train.state import Measured, RawBatch, Resident, State

_AGREE_EVERY = 32  # steps between asking the first process whether it is time for a checkpoint

# Streams of random numbers, apart from each other for every seed.
_INIT, _STEPS = 1, 2


class NotFiniteError(FloatingPointError):
    """A step left NaN or Inf in the parameters or running averages, or had no finite loss."""


@dataclasses.dataclass
class Options:
    """How a run is carried out; none of it changes its result (devices: but for rounding).

    Attributes:
        checkpoint_seconds: save after so many seconds; 0: at every end of an epoch.
        keep: how many checkpoints to keep.
        tensorboard: also write the metrics for TensorBoard.
        devices: how many of this process's devices to use; None: all, of all processes.
        parameters: "replicated" on all devices, or "sharded" over them with the optimizer's state.
        on_epoch: called with every line of metrics.
        on_step: called after every step with the number of steps done.
        on_finished: called with the last line of metrics of a run that was finished before.
    """

    checkpoint_seconds: float = 60.0
    keep: int = 2
    tensorboard: bool = True
    devices: int | None = None
    parameters: str = "replicated"
    on_epoch: Callable[[dict[str, Any]], None] = lambda line: None
    on_step: Callable[[int], None] = lambda step: None
    on_finished: Callable[[dict[str, Any]], None] = lambda line: None


def loop(
    config: Config,
    problem: Problem,
    program: Program,
    run: RunDirectory,
    checkpoints: Checkpoints,
    asked_to_stop: Callable[[int], int | None],
    write_scalars: Callable[[dict[str, Any]], None],
    options: Options,
) -> list[dict[str, Any]]:
    """Trains from the newest checkpoint to the end; returns the lines of metrics of all epochs.

    Raises:
        Interrupted: after SIGTERM or SIGINT, with the state saved.
        NotFiniteError: naming the step; the checkpoints before it are kept.
        CheckpointError: if the last checkpoint, or that of a stop, cannot be kept.
    """
    steps_per_epoch = problem.order.steps_per_epoch
    num_steps = config.epochs * steps_per_epoch
    state, step_key = _first_state(config, program, checkpoints)
    step = int(state.step)
    history = run.keep_metrics(step)
    if len(history) != step // steps_per_epoch:
        raise RunDirectoryError(
            f"{run.path}/metrics.jsonl lacks epochs that the checkpoint of step {step} has: "
            "delete the folder and train again, or take another"
        )
    clock = _Clock(history[-1]["seconds"] if history else 0.0)
    last_save = time.monotonic()

    with contextlib.closing(feed(program, problem, step, num_steps)) as batches:
        while step < num_steps:
            state, waited = advance(program, batches, state, step_key)
            clock.add_step(waited)
            step += 1
            options.on_step(step)

            epoch_ends = step % steps_per_epoch == 0
            if epoch_ends:
                _check_finite(state)
                state, line = _end_epoch(config, problem, program, state, clock, history)
                run.append_metrics(line)
                write_scalars(line)
                options.on_epoch(line)
                history.append(line)
                clock.new_epoch()

            signum = asked_to_stop(step)
            interval = options.checkpoint_seconds
            due = time.monotonic() - last_save >= interval if interval else epoch_ends
            if jax.process_count() > 1:  # their clocks differ, and to ask waits for the step
                due = (epoch_ends or step % _AGREE_EVERY == 0) and distributed.of_first(due)
            if due or signum or step == num_steps:
                _check_finite(state)
                checkpoints.save(step, state)
                last_save = time.monotonic()
            if signum and step < num_steps:
                checkpoints.confirm(step, program.like)
                raise Interrupted(signum, step)
    checkpoints.confirm(num_steps, program.like)
    return history


def _first_state(
    config: Config, program: Program, checkpoints: Checkpoints
) -> tuple[State, jax.Array]:
    """The state of the newest checkpoint, or a fresh one; and the key of the steps."""
    key = jax.random.key(config.seed)
    init_key, step_key = (jax.random.fold_in(key, stream) for stream in (_INIT, _STEPS))
    if program.layout is not None:
        init_key, step_key = program.layout.copy((init_key, step_key))
    state = checkpoints.restore(program.like)
    if state is None:
        state = program.init(init_key)
        if config.pretrained is not None and config.weights_file is None:
            state = saved.with_network_of(pathlib.Path(config.pretrained), state)
    return state, step_key


def advance(
    program: Program, batches: Iterator[RawBatch | Resident], state: State, key: jax.Array
) -> tuple[State, float]:
    """Does one step, without waiting for it; also returns the seconds waited for its batch."""
    before = time.monotonic()
    batch = next(batches)
    waited = time.monotonic() - before
    if program.layout is None:
        return program.step(state, batch, key), waited
    with jax.transfer_guard("disallow"):  # between devices it would be hidden, and slow
        return program.step(state, batch, key), waited


def _end_epoch(
    config: Config,
    problem: Problem,
    program: Program,
    state: State,
    clock: "_Clock",
    history: list[dict[str, Any]],
) -> tuple[State, dict[str, Any]]:
    """The state that the next epoch starts from, and the line of metrics of this one."""
    step = int(state.step)
    running = sums.figures(
        state.sums, true_known=problem.true is not None, judged=program.judges > 0
    )
    measured, scores = evaluate(program, state, problem)
    line = {
        "epoch": step // problem.order.steps_per_epoch,
        "step": step,
        **running,
        **measured,
        **clock.figures(config.k * config.b),
    }
    told = None
    if problem.held_out is not None:
        improved = all(line["held_out"] > before["held_out"] for before in history)
        told = Measured(np.array(improved))
        if state.evidence is not None:
            told = Measured(np.array(improved), problem.held_out.labels, scores)
        if program.layout is not None:
            told = program.layout.copy(told)
    return program.new_epoch(state, told), line


class _Clock:
    """The time that an epoch takes this process, and that of the whole run."""

    def __init__(self, seconds_before: float):
        self._before = seconds_before
        self._started = self._epoch_started = time.monotonic()
        self._steps, self._waited = 0, 0.0

    def add_step(self, waited: float) -> None:
        self._steps += 1
        self._waited += waited

    def figures(self, images_per_step: int) -> dict[str, float]:
        now = time.monotonic()
        seconds = now - self._epoch_started
        return {
            "images_per_second": self._steps * images_per_step / seconds,
            "waiting": self._waited / seconds,
            "seconds": self._before + now - self._started,
        }

    def new_epoch(self) -> None:
        self._epoch_started, self._steps, self._waited = time.monotonic(), 0, 0.0


def _check_finite(state: State) -> None:
    failed = int(jax.device_get(state.failed))
    if failed >= 0:
        raise NotFiniteError(
            f"step {failed} left NaN or Inf in the parameters or the running averages, or had no "
            "finite loss; the checkpoint before it is kept. A smaller learning rate or a clip_norm "
            "may help"
        )
