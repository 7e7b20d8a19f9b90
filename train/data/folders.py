"""A folder of pictures: of which part and class each file is, and what is wrong with the folder."""

import dataclasses
import pathlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np

from train.data import fingerprint, images, labels, pictures
from train.data.account import Account, counted, named
from train.data.files import LIST, NEVER, NO_PICTURE, File, walk
from train.data.images import Ranges
from train.data.types import DataNotFoundError, Dataset, Split

BadFiles = Literal["error", "skip"]
"""What to do about files that cannot be read."""

_LISTED = 20
_LAYOUT = (
    "A folder of pictures is FOLDER/CLASS/..., or FOLDER/train/CLASS/... and FOLDER/test/CLASS/...,"
    " or any folder with a file labels.csv of the columns file,label"
)
_NO_CLASS = "not in a folder of a class"
_OUTSIDE = "outside train and test"


def load(
    folder: pathlib.Path,
    image_size: int | None = None,
    *,
    labels_path: pathlib.Path | None = None,
    bad_files: BadFiles = "error",
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """Loads a folder of pictures; `train.data.load` says what it may look like.

    Raises:
        DataNotFoundError: if the folder or the list of labels is missing.
        ValueError: if there are no pictures with labels, only one class, a class without examples
            or one that only the test part has; if files cannot be read and `bad_files` is "error";
            if the list of labels does not fit.
    """
    if bad_files not in ("error", "skip"):
        raise ValueError(f"bad_files must be error or skip, got {bad_files!r}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    found, folders = _walk(folder)
    has_list = labels_path is not None or any(_is_list(file) for file in found)
    layout = _Layout.of(folder, folders, with_list=has_list)
    for file in found:
        layout.place(file)
    classes = {part: layout.classes(folders, part) for part in labels.PARTS}
    lists, warned = _lists(found, labels_path, needed=len(classes["train"]) < 2)
    for listed in lists:
        labels.apply(listed, found)
    examples = [file for file in found if file.part and file.skipped is None]
    if lists:
        lost = classes["train"]
        classes = {part: _labels(examples, part) for part in labels.PARTS}
        if lost & classes["train"] and (lost := lost - classes["train"]):
            warned.append(f"{lists[-1].path.name} leaves no example of {named(sorted(lost))}")
    class_names = tuple(sorted(classes["train"]))
    _check_examples(folder, found, examples)
    _check_classes(folder, folders, found, class_names, classes["test"])

    read = pictures.read(examples, image_size, on_file)
    bad = [file for file in found if file.bad is not None]
    if bad and bad_files == "error":
        raise ValueError(_bad_list(folder, bad))
    examples = [file for file in examples if file.bad is None]
    _check_full(folder, found, examples, class_names)
    notes = [*layout.notes, *(f"labels: {listed.path}" for listed in lists), *read.notes]
    tested = _labels(examples, "test")
    if not tested:
        notes.append("test part: none, every picture is for training")
    missing = [name for name in class_names if name not in tested]
    if missing and (layout.has_test or tested):
        warned.append(f"the test part has no picture of {named(missing)}")
    for warning in warned:
        warnings.warn(f"{folder}: {warning}", stacklevel=3)
    account = Account.of(str(folder), class_names, found)
    account.notes, account.warnings = notes, warned
    numbers = {name: number for number, name in enumerate(class_names)}
    trained = [file for file in examples if file.part == "train"]
    held_out = np.flatnonzero([file.held_out for file in trained])

    def split(part: str) -> Split:
        of_part = [file for file in examples if file.part == part]
        decoded = read.images.get(part)
        if decoded is None:
            decoded = Files(tuple(file.path for file in of_part), read.shape, read.ranges)
        return Split(decoded, np.array([numbers[f.label] for f in of_part], np.int32))

    return Dataset(
        name="folder",
        train=split("train"),
        test=split("test"),
        num_classes=len(class_names),
        class_names=class_names,
        image_shape=read.shape,
        held_out=held_out if len(held_out) else None,
        train_files=tuple(file.name for file in trained),
        test_files=tuple(file.name for file in examples if file.part == "test"),
        ranges=read.ranges,
        account=account,
        fingerprint=fingerprint.of_files("folder", class_names, read.records),
    )


@dataclasses.dataclass(frozen=True)
class Files:
    """Images in files, decoded when they are read.

    Attributes:
        paths: The files.
        shape: ``(h, w, c)`` of the decoded images.
        ranges: As in `train.data.Dataset`.
    """

    paths: tuple[pathlib.Path, ...]
    shape: tuple[int, int, int]
    ranges: Ranges | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: Sequence[int]) -> np.ndarray:
        decoded = np.empty((len(indices), *self.shape), np.uint8)
        for image, index in zip(decoded, indices, strict=True):
            image[:] = images.decode(self.paths[index], self.shape, ranges=self.ranges)
        return decoded


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where the classes' folders are.

    Attributes:
        roots: The folder of each part; empty where the classes' folders lie at the top.
        notes: What is to be said of it.
    """

    roots: dict[str, str]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: pathlib.Path, folders: set[str], *, with_list: bool) -> "_Layout":
        top = {name for name in folders if "/" not in name}
        roots: dict[str, str] = {}
        for part, names in _PART_NAMES.items():
            for name in sorted(top):
                if name.casefold() in names and roots.setdefault(part, name) != name:
                    raise ValueError(f"{folder} has both {roots[part]} and {name}: keep one")
        train, others = roots.get("train"), top - set(roots.values())
        if train is None and not with_list:
            for name in sorted(roots.values()):
                if not others or any(f"{name}/{other}" in folders for other in others):
                    raise ValueError(f"{folder} has {name}, but no train beside it. {_LAYOUT}")
            return cls({})
        is_parted = not others or any(name.startswith(f"{train}/") for name in folders)
        if not is_parted and not with_list:
            return cls({})  # a class that is called train
        validation = roots.pop("validation", None)
        if validation is None or "test" in roots:
            return cls(roots)
        return cls({**roots, "test": validation}, (f"test part: {validation}",))

    @property
    def has_test(self) -> bool:
        """Whether there is a folder for a test part."""
        return "test" in self.roots

    def place(self, file: File) -> None:
        """Gives a file its part and class, or the reason that it has none."""
        depth = 1 if self.roots else 0
        parts = file.parts
        if depth:
            of_root = {root: part for part, root in self.roots.items()}
            file.part = of_root.get(parts[0], "")
        else:
            file.part = "train"
        if file.part and len(parts) > depth + (not file.is_folder):
            file.label = parts[depth]
        elif not file.is_folder and file.skipped not in NEVER:
            file.skipped, file.bad = _NO_CLASS if file.part else _OUTSIDE, None

    def classes(self, folders: set[str], part: str) -> set[str]:
        """The names of the classes' folders of a part."""
        if not self.roots:
            return {name for name in folders if "/" not in name} if part == "train" else set()
        paths = [name.split("/") for name in folders]
        return {path[1] for path in paths if len(path) == 2 and path[0] == self.roots.get(part)}


_PART_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("val", "valid", "validation"),
}


def _walk(folder: pathlib.Path) -> tuple[list[File], set[str]]:
    if not folder.exists():
        raise DataNotFoundError(f"{folder} does not exist. {_LAYOUT}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder: unpack it if it is an archive")
    try:
        return walk(folder)
    except OSError as error:
        raise ValueError(f"{folder} cannot be listed: {error.strerror or error}") from error


def _lists(
    found: list[File], labels_path: pathlib.Path | None, needed: bool
) -> tuple[list[labels.Labels], list[str]]:
    """The folder's own list, if it has one, and the one that was named; and warnings."""
    lists, warned = [], []
    own = next((file for file in found if _is_list(file)), None)
    if own is not None:
        try:
            lists.append(labels.read(own.path))
            own.skipped = LIST
        except labels.ColumnsError as error:
            if needed and labels_path is None:
                raise
            warned.append(f"not used: {error}")
    if labels_path is not None:
        lists.append(labels.read(labels_path))
        for file in found:
            if file.path.name == labels_path.name and file.path.samefile(labels_path):
                file.skipped = LIST
    return lists, warned


def _is_list(file: File) -> bool:
    return file.name.casefold() == "labels.csv" and file.skipped == NO_PICTURE


def _labels(files: Iterable[File], part: str) -> set[str]:
    return {file.label for file in files if file.part == part and file.label}


def _check_examples(folder: pathlib.Path, found: list[File], examples: list[File]) -> None:
    if _labels(examples, "train"):
        return
    if bad := [file for file in found if file.bad is not None]:
        raise ValueError(_bad_list(folder, bad))
    if loose := [file.name for file in found if file.skipped in (_NO_CLASS, _OUTSIDE)]:
        raise ValueError(
            f"{folder} has no training pictures with a class; {named(loose)} lie in no folder of a "
            f"class. {_LAYOUT}"
        )
    raise ValueError(f"{folder} holds no training pictures ({_reasons(found)}). {_LAYOUT}")


def _check_classes(
    folder: pathlib.Path,
    folders: set[str],
    found: list[File],
    class_names: tuple[str, ...],
    tested: set[str],
) -> None:
    if unknown := sorted(tested - set(class_names)):
        raise ValueError(
            f"{folder}: test has classes that train has not: {named(unknown, most=20)}"
        )
    if len(class_names) == 1:
        inner = sorted(name for name in folders if name.split("/")[-2:-1] == [class_names[0]])
        hint = (
            f"; if its sub-folders {named(inner)} are the classes, name that folder"
            if inner
            else ""
        )
        raise ValueError(f"{folder} has one class only, {class_names[0]}{hint}. {_LAYOUT}")
    with_files = [file for file in found if file.skipped is None]
    _check_full(folder, found, with_files, class_names)


def _check_full(
    folder: pathlib.Path, found: list[File], examples: list[File], class_names: tuple[str, ...]
) -> None:
    """Raises an error if a class has no training example."""
    have = _labels(examples, "train")
    if empty := [name for name in class_names if name not in have]:
        why = {
            name: _reasons([f for f in found if f.part == "train" and f.label == name])
            for name in empty[:_LISTED]
        }
        raise ValueError(
            f"{folder}: no picture to train on in {counted(len(empty), 'class', 'classes')}: "
            + "; ".join(f"{name} ({reasons})" for name, reasons in why.items())
            + ". Add pictures or remove the folder"
        )


def _reasons(files: list[File]) -> str:
    """What became of files, in words."""
    reasons = Counter(file.bad or file.skipped or "readable" for file in files)
    return ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common()) or "empty"


def _bad_list(folder: pathlib.Path, bad: list[File]) -> str:
    lines = [f"  {file.name}: {file.bad}" for file in bad[:_LISTED]]
    if len(bad) > _LISTED:
        lines.append(f"  ... and {len(bad) - _LISTED:,} more")
    count = counted(len(bad), "file")
    head = f"{count} of {folder} cannot be read; --bad-files skip goes on without:"
    return "\n".join([head, *lines])
