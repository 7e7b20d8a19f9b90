"""Progress of a run: a bar on a terminal; elsewhere, as in a file, a line an epoch."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from train.config import Config
from train.loop import Options


class Display:
    """The run at hand: epoch, accuracies, images per second, time left or taken."""

    def __init__(self, console: Console):
        """Draws on `console`."""
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "Display":
        """Starts drawing."""
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Leaves the last state on the screen."""
        self._progress.stop()

    def follow(self, title: str, steps: int, config: Config) -> Options:
        """Options of a run that make it report to a bar, which replaces the one before."""
        for done in self._progress.task_ids:
            self._progress.remove_task(done)
        task = self._progress.add_task(title, total=steps, figures="")

        def on_epoch(line: dict[str, Any]) -> None:
            figures = describe(line, config.epochs)
            self._progress.update(task, figures=figures)
            if not self._console.is_terminal:
                self._console.print(f"{title} {figures}", soft_wrap=True)

        def on_step(step: int) -> None:
            self._progress.update(task, completed=step)

        return Options(on_epoch=on_epoch, on_step=on_step, on_finished=on_epoch)

    def say(self, line: str) -> None:
        """Prints a line, which stays, in place of the bar."""
        for done in self._progress.task_ids:
            self._progress.remove_task(done)
        self._progress.console.print(line)


_MANY = 1000  # files: to read fewer takes a moment


@contextlib.contextmanager
def reading(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar that goes on while the files of a folder are read; in a file, a line if they are many.

    Yields:
        what `train.data.load` takes as `on_file`.
    """
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(compact=True)
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task("reading pictures", start=False, visible=False)
        begun = False

        def on_file(done: int, total: int) -> None:
            nonlocal begun
            if not begun:
                begun = True
                bar.start_task(task)
                if not console.is_terminal and total >= 2 * _MANY:
                    console.print(f"reading {total // 2:,} pictures", soft_wrap=True)  # twice each
            bar.update(task, completed=done, total=total, visible=True)

        yield on_file


def describe(line: dict[str, Any], epochs: int) -> str:
    """A line of metrics in a few words."""
    accuracies = "".join(
        f" {words} {line[name]:.1f}%"
        for name, words in (("test", "test"), ("held_out", "held-out"))
        if name in line
    )
    speed = f"{line['images_per_second']:,.0f} img/s"
    return f"epoch {line['epoch']}/{epochs}{accuracies} {speed}"
