"""Many runs, one after another: finished ones are not trained again, the others go on."""

import pathlib
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from train import trainer
from train.config import Config
from train.progress import Display
from train.run_directory import InUseError, read_metrics, read_result

Outcome = tuple[dict[str, Any], list[dict[str, Any]]]
"""The result of a finished run, and its lines of metrics."""


COLUMNS = {
    "train_noisy": "train,\ngiven",
    "train_clean": "train,\ntrue",
    "test_last": "test,\nlast",
    "stopped": "test,\nstopped",
    "test_best": "test,\nbest",
    "seconds": "seconds",
}
"""The figures of a run that tables show, and their headings; what no run has is left out."""


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
            finished = read_result(run.directory) is not None
            known = finished and run.config.dataset != "folder"  # which may have changed since
            problem = None if known else trainer.load_problem(run.config)
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
                    f"{run.title}: {in_words(result)}, {result['seconds']:.0f} s"
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


def rounded(results: list[dict[str, Any]], names: Collection[str]) -> dict[str, dict[str, float]]:
    """`over_seeds` as JSON tables have it: name -> {mean, std}, to hundredths."""
    row = over_seeds(results, names)
    return {
        name: {part: round(row[f"{name}_{part}"], 2) for part in ("mean", "std")} for name in names
    }


def merged(
    known: Mapping[str, Any], found: Mapping[str, Any], order: Iterable[str]
) -> dict[str, Any]:
    """The rows of both tables that `order` has: what is found in place of what is known."""
    both = {**known, **found}
    return {row: both[row] for row in order if row in both}


def in_words(result: dict[str, Any]) -> str:
    """The accuracies of a finished run, in a line."""
    figures = [
        f"{words} {result[name]:.1f}%"
        for name, words in (
            ("test_last", "test"),
            ("stopped", "stopped by held-out labels"),
            ("test_best", "best"),
            ("held_out", "held-out labels"),
        )
        if name in result
    ]
    return ", ".join(figures) or f"training labels {result['train_noisy']:.1f}%"


def table(first: str, rows: Mapping[str, Mapping[str, Any]], **options: Any) -> Table:
    """Rows of `over_seeds`, by what the `first` column is to show, for a terminal."""
    shown = [name for name in COLUMNS if any(f"{name}_mean" in row for row in rows.values())]
    result = Table(**options)
    result.add_column(first, no_wrap=True)
    for name in shown:
        result.add_column(COLUMNS[name], justify="right")
    for label, row in rows.items():
        figures = (with_deviation(row, name) for name in shown)
        result.add_row(label, *figures)
    return result


def with_deviation(row: Mapping[str, Any], name: str) -> str:
    """Mean and deviation of a figure of `over_seeds`; empty where the runs do not have it."""
    if f"{name}_mean" not in row:
        return ""
    return f"{row[f'{name}_mean']:.1f} ± {row[f'{name}_std']:.1f}"


def cell(figure: Mapping[str, float], seeds: int) -> str:
    """``{mean, std}`` of a figure for a table; the deviation is of several seeds alone."""
    mean, deviation = figure["mean"], figure["std"]
    return f"{mean:.1f} ± {deviation:.1f}" if seeds > 1 else f"{mean:.1f}"


def outcome(directory: pathlib.Path) -> Outcome | None:
    """What is known of a run that may be finished; None where it is not."""
    result = read_result(directory)
    return None if result is None else (result, read_metrics(directory))
