"""Many runs, one after another: finished ones are not trained again, the others go on."""

import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from rich.console import Console

from train import trainer
from train.config import Config
from train.progress import Display
from train.run_directory import InUseError, read_metrics

Outcome = tuple[dict[str, Any], list[dict[str, Any]]]
"""The result of a finished run, and its lines of metrics."""


class Run(NamedTuple):
    """A run to be trained: what the display calls it, its config, its run directory."""

    title: str
    config: Config
    directory: pathlib.Path


def train_all(
    runs: Iterable[Run],
    console: Console,
    on_finished: Callable[[Run], None] = lambda run: None,
    devices: int | None = 1,
) -> dict[pathlib.Path, Outcome]:
    """Trains the runs in their order; returns what is known of the finished ones.

    A run whose directory another process holds is left to that process, so that several can
    share the work. A run that ends in NaN or Inf does not keep the others from being trained.

    Args:
        runs: the runs; a generator may decide late what comes next.
        console: shows a bar for the run at hand, and a line for every finished one.
        on_finished: called after every run that this process has finished.
        devices: as in `trainer.Options`.

    Raises:
        NotFiniteError: when all are done, if any has failed so.
        Otherwise as `trainer.train`, but for `InUseError`.
    """
    outcomes, failed = {}, []
    with Display(console) as display:
        for run in runs:
            finished = (run.directory / "result.json").exists()
            epochs = run.config.epochs
            # Noise, and with it the number of k-tuples of a class, differs between seeds.
            steps = (
                read_metrics(run.directory)[-1]["step"]
                if finished
                else epochs * trainer.load_problem(run.config).order.steps_per_epoch
            )
            options = display.follow(run.title, steps, run.config)
            options.tensorboard = False
            options.devices = devices
            try:
                result = trainer.train(run.config, run.directory, options)
            except InUseError:
                display.say(f"{run.title}: in use by another process, which is left to it")
            except trainer.NotFiniteError as error:
                failed.append(f"{run.title}: {error}")
                display.say(failed[-1])
            else:
                outcomes[run.directory] = (result, read_metrics(run.directory))
                display.say(
                    f"{run.title}: test {result['test_last']:.1f}% "
                    f"(best {result['test_best']:.1f}%), {result['seconds']:.0f} s"
                    + (", finished before" if finished else "")
                )
                if not finished:
                    on_finished(run)
    if failed:
        raise trainer.NotFiniteError("; ".join(failed))
    return outcomes


def outcome(directory: pathlib.Path) -> Outcome | None:
    """What is known of a run that may be finished; None where it is not."""
    file = directory / "result.json"
    return (json.loads(file.read_text()), read_metrics(directory)) if file.exists() else None
