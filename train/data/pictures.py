"""One pass over all files of a folder of pictures: what can be read, and the arrays of it."""

import dataclasses
import itertools
import math
import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from train.data import images
from train.data.account import counted
from train.data.files import File
from train.data.fingerprint import Record, digest
from train.data.images import Look, Ranges

_IN_MEMORY_BYTES = 2 << 30
_LARGEST_KEPT = 256
_DEFAULT_SIDE = 64
_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Pictures:
    """What the pass found.

    Attributes:
        shape: ``(h, w, c)`` of all images.
        ranges: As in `train.data.Dataset`.
        notes: What was decided for all pictures together.
        images: By part, ``uint8 [n, h, w, c]``, the images of the files that are not bad; a part
            of more than 2 GiB is missing.
        records: For fingerprints, by the file's name.
    """

    shape: tuple[int, int, int]
    ranges: Ranges
    notes: list[str]
    images: dict[str, np.ndarray]
    records: dict[str, Record]


def read(
    files: Sequence[File],
    image_size: int | None = None,
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> Pictures:
    """Decodes every file once, after a look at all of them has settled size, colours and ranges.

    `train.data.load` says how they are chosen. Only files that can be read have a say in it.

    Args:
        files: Pictures with part and label; bad ones are left alone. What is wrong with a file is
            put into its `bad`, what was changed into its `converted`.
        image_size: The side to scale and cut all pictures to.
        on_file: Called with the number of files done and of all; each counts twice, once for the
            look.
    """
    files = [file for file in files if file.bad is None]
    done, total = itertools.count(1), 2 * len(files)

    def each(function: Callable[[File], Any], some: Sequence[File]) -> Iterator[tuple[File, Any]]:
        for file, result in zip(some, _in_threads(function, some), strict=True):
            on_file(min(next(done), total), total)
            yield file, result

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about oddities of single files
        looks: dict[str, Look] = {}
        for file, found in each(_look, files):
            if isinstance(found, Look):
                looks[file.name] = found
            else:
                file.bad = found
        good = [file for file in files if file.bad is None]
        shape, ranges, notes = _choose([looks[file.name] for file in good], image_size)
        while True:
            decoded = _Decoded(good, shape, ranges)
            for file, found in each(decoded.add, good):
                file.bad = found
            before = shape, ranges
            good = [file for file in good if file.bad is None]
            shape, ranges, notes = _choose([looks[file.name] for file in good], image_size)
            if (shape, ranges) == before:  # also without the files that turned out to be bad
                break
    for file in good:
        file.converted += decoded.how[file.name]
    records = {file.name: decoded.records[file.name] for file in good}
    return Pictures(shape, ranges, notes, decoded.images(), records)


class _Decoded:
    """Room for the images of a plan."""

    def __init__(self, files: list[File], shape: tuple[int, int, int], ranges: Ranges):
        self._files, self._shape, self._ranges = files, shape, ranges
        self._room: dict[str, np.ndarray] = {}
        self._row: dict[str, int] = {}
        self.how: dict[str, tuple[str, ...]] = {}
        self.records: dict[str, Record] = {}
        for part in ("train", "test"):
            of_part = [file for file in files if file.part == part]
            if len(of_part) * math.prod(shape) <= _IN_MEMORY_BYTES:
                self._room[part] = np.empty((len(of_part), *shape), np.uint8)
            self._row.update({file.name: row for row, file in enumerate(of_part)})

    def add(self, file: File) -> str | None:
        """Decodes a file; returns why that cannot be done, or None."""
        try:
            content = file.path.read_bytes()
            image, how = images.convert(content, self._shape, ranges=self._ranges)
        except Exception as error:
            return images.reason(error)
        if file.part in self._room:
            self._room[file.part][self._row[file.name]] = image
        self.how[file.name] = how
        self.records[file.name] = (file.part, file.label, len(content), digest(content))
        return None

    def images(self) -> dict[str, np.ndarray]:
        """By part, the images that could be decoded."""
        made = {}
        for part, room in self._room.items():
            good = [file.name for file in self._files if file.part == part and file.bad is None]
            rows = [self._row[name] for name in good]
            made[part] = room if len(rows) == len(room) else room[rows]
        return made


def _look(file: File) -> Look | str:
    try:
        return images.look(file.path)
    except Exception as error:
        return images.reason(error)


def _in_threads(function: Callable[[File], Any], files: Sequence[File]) -> Iterator[Any]:
    """The results in order; a part at a time, so that Ctrl-C does not wait for all."""
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(files), _AT_ONCE):
            yield from pool.map(function, files[start : start + _AT_ONCE])


def _choose(
    looks: Sequence[Look], image_size: int | None
) -> tuple[tuple[int, int, int], dict[str, tuple[float, float]], list[str]]:
    """Shape and ranges for all pictures, and why."""
    notes = []
    sizes = sorted({(look.height, look.width) for look in looks})
    if image_size is not None:
        height = width = image_size
        notes.append(f"size: {_cut(image_size)}")
    elif len(sizes) == 1 and min(sizes[0]) <= _LARGEST_KEPT:
        height, width = sizes[0]
        notes.append(f"size: {height} x {width} (height x width), as the files have it")
    else:
        sides = [min(look.height, look.width) for look in looks]
        height = width = min(_DEFAULT_SIDE, statistics.median_low(sides or [1]))
        (h0, w0), (h1, w1) = (sizes or [(1, 1)])[0], (sizes or [(1, 1)])[-1]
        several = f"the files have {counted(len(sizes), 'size')}, {h0} x {w0} (height x width)"
        several += f" to {h1} x {w1}" if len(sizes) > 1 else ""
        notes.append(f"size: {_cut(width)}: {several}; --image-size N takes N x N")
    grey = sum(look.grey for look in looks)
    if 0 < grey < len(looks):
        notes.append(
            f"colours: RGB, since only {counted(grey, 'picture')} of {len(looks):,} are grey"
        )
    ranges = {}
    for kind in sorted({look.kind for look in looks if look.kind}):
        of_kind = [look for look in looks if look.kind == kind]
        low = min(0.0, *(look.low for look in of_kind))
        high = max(look.high for look in of_kind)
        ranges[kind] = (low, high)
        notes.append(f"{kind}: {low:,g} becomes black and {high:,g} white, in all such files alike")
    channels = 1 if grey == len(looks) else 3
    return (height, width, channels), ranges, notes


def _cut(side: int) -> str:
    return f"{side} x {side}, the shorter side scaled to {side} and the central square kept"
