"""New pictures and a trained network: a line of a CSV file for each."""

import csv
import dataclasses
import itertools
import pathlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import jax
import numpy as np
from flax import nnx

from train import augment, export, step
from train.config import ConfigError
from train.data import files, images
from train.data.account import counted, named

_HEADER = ("file", "label", "confidence")
_BATCH = 64
_SHOWN, _LISTED = 10, 20


class Predictor:
    """What a network says of pictures."""

    def __init__(self, model: export.Model):
        """Builds the network; `model` says what it takes."""
        self.model = model
        graph, state = nnx.split(model.build())
        # Decoded pictures have 255 for white, whatever the data had that were trained on.
        preset = augment.preset(model.preset, model.image_shape, export.WHITE)

        @jax.jit
        def scores(state, images, key):
            network = nnx.merge(graph, state, copy=True)
            return step.scores(network, preset, images, key, multi_label=model.multi_label)

        self._scores, self._state = scores, state

    def read(self, file: pathlib.Path) -> np.ndarray:
        """Decodes a picture as those that were trained on: ``uint8 [h, w, c]``.

        Raises:
            Exception: whatever Pillow raises; `train.data.images.reason` says it in words.
        """
        model = self.model
        return images.convert(file, model.image_shape, model.fit, model.ranges)[0]

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """The probabilities of the classes, ``float32 [n, classes]``, of ``uint8 [n, h, w, c]``.

        They add up to 1, but where a picture may have several labels.
        """
        scores = np.asarray(self._scores(self._state, pixels, jax.random.key(0)))
        return scores if self.model.multi_label else np.exp(scores)


def find(places: Iterable[pathlib.Path]) -> tuple[list[files.File], list[files.File]]:
    """Lists pictures: files as they are, and of folders the pictures in them, at any depth.

    Returns:
        ``(pictures, skipped)``; the second are other files in the folders.

    Raises:
        ConfigError: if no place is given, or one does not exist or holds no picture.
    """
    found: list[files.File] = []
    for place in places:
        name = files.readable(str(place))
        if not place.exists():
            raise ConfigError(f"{name} does not exist: give pictures, or folders of pictures")
        if not place.is_dir():
            found.append(files.File(place, name))
            continue
        inside, _ = files.walk(place)
        if all(file.skipped for file in inside):
            raise ConfigError(f"{name} holds no pictures")
        found += [dataclasses.replace(file, name=f"{name}/{file.name}") for file in inside]
    if not found:
        raise ConfigError("no pictures given: name pictures, or folders of pictures")
    return [x for x in found if not x.skipped], [x for x in found if x.skipped]


@dataclasses.dataclass(frozen=True)
class Predicted:
    """What was written.

    Attributes:
        rows: The first ones.
        labels: How often each class was the first choice.
        bad: The pictures that could not be read, each with the reason.
    """

    rows: list[list[str]]
    labels: Counter[str]
    bad: list[tuple[str, str]]

    @property
    def count(self) -> int:
        """The number of pictures."""
        return self.labels.total() + len(self.bad)

    def said(self, skipped: Sequence[files.File]) -> Iterator[str]:
        """The same in lines for a reader; `skipped` as `find` gives them."""
        if self.count <= _SHOWN:
            for name, label, confidence, *_ in self.rows:
                if label:
                    yield f"{name}: {label} ({100 * float(confidence):.1f}%)"
        by_reason: dict[str, list[str]] = {}
        for file in skipped:
            by_reason.setdefault(file.skipped or "", []).append(file.name)
        for reason, names in by_reason.items():
            yield f"skipped, {reason}: {named(names)}"
        yield from _bad_list(self.bad)
        first = ", ".join(f"{n:,} {label}" for label, n in self.labels.most_common(_SHOWN))
        more = ", ..." if len(self.labels) > _SHOWN else ""
        yield f"{counted(self.count, 'picture')}: {first or 'none read'}{more}"


def write(
    predictor: Predictor,
    pictures: Sequence[files.File],
    out: pathlib.Path,
    *,
    top: int = 1,
    bad_files: Literal["error", "skip"] = "error",
    on_picture: Callable[[], object] = lambda: None,
) -> Predicted:
    """Writes a line per picture, in the order given; memory does not grow with their number.

    Columns: ``file``, ``label``, ``confidence`` (from 0 to 1) and, with `top` above 1, ``label_2``,
    ``confidence_2`` and so on, the next best. A picture that cannot be read has empty ones.

    Args:
        predictor: the network.
        pictures: as `find` lists them, none skipped.
        out: the file, in place of an earlier one of the same kind.
        top: how many classes to name.
        bad_files: "error" to write nothing if any picture cannot be read.
        on_picture: called after each picture.

    Raises:
        ConfigError: if `top` is more than there are classes; if `out` is something else or cannot
            be written; if pictures cannot be read and `bad_files` is "error": lists them.
    """
    names = predictor.model.class_names
    if not 1 <= top <= len(names):
        raise ConfigError(f"top must be from 1 to the number of classes, {len(names)}, got {top}")
    _check_out(out)
    labels: Counter[str] = Counter()
    first: list[list[str]] = []
    bad: list[tuple[str, str]] = []
    header = [*_HEADER, *(f"{x}_{n}" for n in range(2, top + 1) for x in _HEADER[1:])]
    new = out.with_name(f"{out.name}.new")
    with export.writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(new, "w", newline="", encoding="utf-8") as opened:
                writer = csv.writer(opened, lineterminator="\n")
                writer.writerow(header)
                for file, scores in _scored(predictor, pictures):
                    row = [file.name, *[""] * 2 * top]
                    if isinstance(scores, str):
                        bad.append((file.name, scores))
                    else:
                        order = np.argsort(-scores, kind="stable")[:top]
                        row[1:] = [x for i in order for x in (names[i], f"{scores[i]:.4f}")]
                        labels[names[order[0]]] += 1
                    writer.writerow(row)
                    if len(first) < _SHOWN:
                        first.append(row)
                    on_picture()
            if bad and bad_files == "error":
                count = f"{counted(len(bad), 'picture')} of {len(pictures):,}"
                head = f"{count} cannot be read; --bad-files skip goes on without:"
                raise ConfigError("\n".join([head, *_bad_list(bad)]))
            new.replace(out)
        finally:
            new.unlink(missing_ok=True)
    return Predicted(first, labels, bad)


def _scored(
    predictor: Predictor, pictures: Sequence[files.File]
) -> Iterator[tuple[files.File, np.ndarray | str]]:
    """Every picture with the probabilities of the classes, or the reason that it cannot be read."""
    size = min(_BATCH, len(pictures))

    def read(file: files.File) -> np.ndarray | str:
        if file.bad is not None:
            return file.bad
        try:
            return predictor.read(file.path)
        except Exception as error:  # whatever Pillow makes of a damaged file
            return images.reason(error)

    def score(
        batch: list[files.File], read: Iterable[np.ndarray | str]
    ) -> Iterator[tuple[files.File, np.ndarray | str]]:
        decoded = list(read)
        pixels = np.zeros((size, *predictor.model.image_shape), np.uint8)
        for i, one in enumerate(decoded):
            if not isinstance(one, str):
                pixels[i] = one
        for file, one, scores in zip(batch, decoded, predictor(pixels), strict=False):
            yield file, one if isinstance(one, str) else scores

    remaining = iter(pictures)
    reading: deque[tuple[list[files.File], Iterable[np.ndarray | str]]] = deque()
    with ThreadPoolExecutor() as threads:
        while batch := list(itertools.islice(remaining, size)):
            reading.append((batch, threads.map(read, batch)))
            if len(reading) == 2:  # the threads read one batch while the network has another
                yield from score(*reading.popleft())
        while reading:
            yield from score(*reading.popleft())


def _check_out(out: pathlib.Path) -> None:
    """Raises ConfigError where something else than predictions would be lost."""
    if out.is_dir():
        raise ConfigError(f"{out} is a folder: give --out a file, such as {out}/predictions.csv")
    if out.exists() and out.stat().st_size:
        with open(out, "rb") as before:
            if not before.read(100).startswith(",".join(_HEADER).encode()):
                raise ConfigError(f"{out} exists and holds no predictions: give --out another name")


def _bad_list(bad: Sequence[tuple[str, str]]) -> Iterator[str]:
    for name, reason in bad[:_LISTED]:
        yield f"  cannot be read: {name}: {reason}"
    if len(bad) > _LISTED:
        yield f"  ... and {len(bad) - _LISTED:,} more"
