"""Many runs, one after another: finished ones are not trained again, the others go on."""

import json
import pathlib
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from rich.console import Console

from train import trainer
from train.config import Config
from train.progress import Display
from train.run_directory import InUseError, read_metrics

Outcome = tuple[dict[str, Any], list[dict[str, Any]]]
"""The result of a finished run, and its lines of metrics."""


COLUMNS = {
    "train_noisy": "train,\ngiven",
    "train_clean": "train,\ntrue",
    "test_last": "test,\nlast",
    "test_best": "test,\nbest",
    "seconds": "seconds",
}
"""The figures of a run that tables show, and their headings."""


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
            problem = None if finished else trainer.load_problem(run.config)
            # Noise, and with it the number of k-tuples of a class, differs between seeds.
            steps = (
                read_metrics(run.directory)[-1]["step"]
                if problem is None
                else run.config.epochs * problem.order.steps_per_epoch
            )
            options = display.follow(run.title, steps, run.config)
            options.tensorboard = False
            options.devices = devices
            try:
                result = trainer.train(run.config, run.directory, options, problem)
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


def over_seeds(results: list[dict[str, Any]], names: Iterable[str]) -> dict[str, float]:
    """Means and sample standard deviations of the named figures, where the results have them."""
    row: dict[str, float] = {}
    for name in names:
        values = [result[name] for result in results if name in result]
        if values:
            row[f"{name}_mean"] = statistics.fmean(values)
            row[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return row


def cells(row: dict[str, float]) -> list[str]:
    """What a table shows of `over_seeds`, in the order of `COLUMNS`."""
    return [f"{row[f'{name}_mean']:.1f} ± {row[f'{name}_std']:.1f}" for name in COLUMNS]


def outcome(directory: pathlib.Path) -> Outcome | None:
    """What is known of a run that may be finished; None where it is not."""
    file = directory / "result.json"
    return (json.loads(file.read_text()), read_metrics(directory)) if file.exists() else None
