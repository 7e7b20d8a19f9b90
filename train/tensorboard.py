"""The metrics, for TensorBoard."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def writer(directory: pathlib.Path, wanted: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Within, the yielded function writes the numbers of a line of metrics, if that is wanted."""
    if not wanted:
        yield lambda line: None
        return
    import tensorboardX

    with tensorboardX.SummaryWriter(str(directory / "tensorboard")) as file:

        def write(line: dict[str, Any]) -> None:
            for name, value in line.items():
                if isinstance(value, (int, float)):
                    file.add_scalar(name, value, line["step"])
            file.flush()

        yield write
