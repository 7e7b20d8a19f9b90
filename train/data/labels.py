"""Lists of labels: a CSV file with a row per example, which replaces the labels that it has."""

import csv
import dataclasses
import io
import os
import pathlib
import unicodedata
from collections.abc import Container, Iterable, Sequence

import numpy as np

from train.data.account import Account, counted, named
from train.data.files import NEVER, File
from train.data.types import DataNotFoundError, Dataset, Split

PARTS = ("train", "test")
HELD_OUT = "held_out"
_SPLITS = {"": "", "train": "train", "test": "test", HELD_OUT: "train"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a list.

    Attributes:
        line: Its line in the file.
        example: The file, or the number of the example.
        label: The class.
        part: "train", "test", or "" where the list does not say.
        held_out: Whether it is a training example that is never to be trained on.
    """

    line: int
    example: str
    label: str
    part: str
    held_out: bool = False


@dataclasses.dataclass(frozen=True)
class Labels:
    """A list of labels.

    Attributes:
        path: The file.
        rows: Its rows, one for each example.
    """

    path: pathlib.Path
    rows: tuple[Row, ...]


class ColumnsError(ValueError):
    """The file is a table of something else."""


def read(path: pathlib.Path, column: str = "file") -> Labels:
    """Reads a CSV file of labels, with commas, semicolons or tabs, in UTF-8.

    Args:
        path: The file. Its first line names the columns: `column`, ``label`` and perhaps
            ``split`` ("train", "test", or "held_out" for training examples that are to be held
            out of the training), in any order; others are left alone.
        column: "file" or "example".

    Raises:
        DataNotFoundError: if there is no such file.
        ColumnsError: if a column is missing.
        ValueError: if the file is no CSV file, or rows are incomplete or contradict each other;
            names the lines.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataNotFoundError(f"{path} does not exist (a list of labels)") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        lines = [(table.line_num, cells) for cells in table if any(c.strip() for c in cells)]
    except csv.Error as error:
        raise ValueError(f"{path}:{table.line_num} is not a line of a CSV file: {error}") from error
    names = [cell.strip().lower() for cell in lines[0][1]] if lines else []
    if column not in names or "label" not in names:
        raise ColumnsError(
            f"{path} must have the columns {column},label and may have split, named in its first "
            f"line, which is {head.strip()!r}"
        )
    places = {name: names.index(name) for name in (column, "label", "split") if name in names}
    rows: dict[str, Row] = {}
    wrong = []
    for line, cells in lines[1:]:
        values = {k: cells[i] if i < len(cells) else "" for k, i in places.items()}
        label = unicodedata.normalize("NFC", values["label"].strip())
        split = values.get("split", "").strip().lower()
        row = Row(line, values[column], label, _SPLITS.get(split, ""), split == HELD_OUT)
        if not row.example.strip() or not row.label:
            wrong.append(f"line {line}: no {'label' if row.example.strip() else column}")
        elif split not in _SPLITS:
            wrong.append(f"line {line}: split is {split!r}, not train, held_out or test")
        elif row != dataclasses.replace(same := rows.setdefault(row.example, row), line=line):
            wrong.append(f"line {line}: {row.example} is also in line {same.line}, differently")
    _refuse(path, wrong)
    return Labels(path, tuple(rows.values()))


def write(
    path: str | os.PathLike,
    names: Iterable[str],
    labels: Iterable[str],
    column: str = "file",
    held_out: Container[str] | None = None,
) -> None:
    """Writes a CSV file of labels, all or nothing, as `read` takes it.

    Args:
        path: The file.
        names: The training examples, as `Dataset.train_names` calls them.
        labels: Their classes' names.
        column: "file", or "example" where the names are numbers.
        held_out: Of the examples those that are to be held out of the training; None to leave
            that open.

    Raises:
        OSError: if it cannot be written.
    """
    unfinished = pathlib.Path(f"{path}.tmp")
    with open(unfinished, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        if held_out is None:
            table.writerow((column, "label"))
            table.writerows(zip(names, labels, strict=True))
        else:
            table.writerow((column, "label", "split"))
            for name, label in zip(names, labels, strict=True):
                table.writerow((name, label, HELD_OUT if name in held_out else "train"))
    unfinished.replace(path)


def apply(labels: Labels, files: Sequence[File]) -> None:
    """Gives files the labels of a list, in place.

    A file of the list gets its label, and its part where the list says one; a file of neither part
    becomes one of the training part. A file that the list lacks is skipped, unless it has a label
    and is of the test part.

    Args:
        labels: The list. It names a file by its path below the folder or, where no other has it, by
            its last name alone.
        files: The files of a folder, with the labels that they have without the list.

    Raises:
        ValueError: if rows name files that are not there, are no pictures or are not the only ones
            of their name; lists them.
    """
    by_name = {file.name: file for file in reversed(files)}  # the first of equal names
    by_last: dict[str, list[File]] = {}
    for file in files:
        by_last.setdefault(file.parts[-1], []).append(file)
    rows: dict[str, Row] = {}
    wrong = []
    for row in labels.rows:
        file = _find(row.example, by_name, by_last)
        if file is None:
            wrong.append(f"line {row.line}: {row.example}")
        elif file.skipped in NEVER:
            wrong.append(f"line {row.line}: {row.example} ({file.skipped})")
        elif (same := rows.setdefault(file.name, row)) is not row and same.label != row.label:
            wrong.append(f"line {row.line}: {row.example} is also in line {same.line}, differently")
    _refuse(labels.path, wrong, "each must name one picture of the folder")
    listed = labels.path.name
    classes = {row.label for row in labels.rows}
    for file in files:
        row = rows.get(file.name)
        if row is not None:
            if file.label in classes - {row.label}:
                file.converted += (f"relabelled by {listed}",)
            file.skipped, file.label = None, row.label
            file.part = row.part or file.part or "train"
            file.held_out = row.held_out
        elif file.skipped in NEVER or file.is_folder:
            continue
        elif file.part != "test" or not file.label:
            file.skipped, file.bad = f"not in {listed}", None


def correct(dataset: Dataset, path: pathlib.Path) -> Dataset:
    """Replaces the training labels of a data set that is not a folder.

    Args:
        dataset: The data set.
        path: A CSV file with the columns ``example``, the number in the training split, and
            ``label``, the class by name. Examples that it lacks are dropped.

    Raises:
        DataNotFoundError: if there is no such file.
        ValueError: as `read` does; if an example or a class does not exist, or the data set has
            several labels for an image.
    """
    if dataset.multi_label:
        raise ValueError(f"{path}: a list of labels is for one label per image, not {dataset.name}")
    labels = read(path, "example")
    classes = {name: number for number, name in enumerate(dataset.class_names)}
    chosen: dict[int, int] = {}
    held_out = []
    wrong = []
    for row in labels.rows:
        text = row.example.strip()
        number = int(text) if text.isascii() and text.isdigit() else -1
        if not 0 <= number < len(dataset.train):
            wrong.append(f"line {row.line}: no example {text}, only 0 to {len(dataset.train) - 1}")
        elif row.label not in classes:
            wrong.append(f"line {row.line}: no class {row.label}")
        elif row.part == "test":
            wrong.append(f"line {row.line}: the test part cannot be changed")
        elif chosen.setdefault(number, classes[row.label]) != classes[row.label]:
            wrong.append(f"line {row.line}: example {number} has another label before")
        elif row.held_out:
            held_out.append(number)
    _refuse(path, wrong)
    kept = np.array(sorted(chosen), np.int64)
    given = np.array([chosen[number] for number in kept.tolist()], np.int32)
    if len(absent := sorted(set(range(dataset.num_classes)) - set(given.tolist()))):
        without = named([dataset.class_names[number] for number in absent])
        raise ValueError(f"{path} leaves no example of {without}")
    files = []
    for number, label in enumerate(dataset.train.labels.tolist()):
        file = File(path, str(number), part="train", label=dataset.class_names[label])
        if number not in chosen:
            file.skipped = f"not in {path.name}"
        elif chosen[number] != label:
            file.label = dataset.class_names[chosen[number]]
            file.converted = (f"relabelled by {path.name}",)
        files.append(file)
    for label in dataset.test.labels.tolist():
        files.append(File(path, "", part="test", label=dataset.class_names[label]))
    account = Account.of(dataset.name, dataset.class_names, files)
    account.notes.append(f"labels from {path}")
    taken = dataset.train.take(kept)
    return dataclasses.replace(
        dataset,
        train=Split(taken.images, given),
        train_numbers=kept,
        held_out=np.searchsorted(kept, sorted(held_out)) if held_out else None,
        account=account,
    )


def _find(name: str, by_name: dict[str, File], by_last: dict[str, list[File]]) -> File | None:
    for spelled in (name, name.strip(), name.strip().replace("\\", "/")):
        composed = unicodedata.normalize("NFC", spelled).removeprefix("./")
        if composed in by_name:
            return by_name[composed]
    found = by_last.get(composed, [])
    usable = [file for file in found if file.skipped is None] or found
    return usable[0] if len(usable) == 1 else None


def _refuse(path: pathlib.Path, wrong: list[str], rule: str = "") -> None:
    if wrong:
        first = "; ".join(wrong[:20]) + ("; ..." if len(wrong) > 20 else "")
        rule = rule and f" ({rule})"
        raise ValueError(f"{path}: {counted(len(wrong), 'row')} cannot be used{rule}: {first}")
