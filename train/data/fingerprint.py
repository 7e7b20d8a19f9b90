"""What tells the data of a run from others, and in words what differs.

A fingerprint is a dict that `json` writes. That of a folder has a record of every example, so that
two of them say which files were added, removed, moved, relabelled or changed::

    {"name": "folder", "classes": ["cat", "dog"], "train": 800, "test": 200,
     "files": {"train/cat/a.png": ["train", "cat", 5120, "9f86d081884c7d65"], ...}}

A record holds the part, the class, the bytes and a hash of them. Of other data sets there are
hashes of the labels and, as far as they are in memory, of the images.
"""

import hashlib
from collections import defaultdict
from typing import Any

import numpy as np

from train.data.account import counted, named
from train.data.types import Dataset, Split

Record = tuple[str, str, int, str]
"""Part, class, bytes, hash of the bytes."""


def digest(content: bytes | memoryview) -> str:
    """A hash of 16 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def of_files(name: str, classes: tuple[str, ...], files: dict[str, Record]) -> dict[str, Any]:
    """The fingerprint of a folder.

    Args:
        name: The name of the data set.
        classes: The class names.
        files: The record of every example, by its file's name.
    """
    counts = {part: sum(record[0] == part for record in files.values()) for part in _PARTS}
    records = {file: list(record) for file, record in files.items()}
    return {"name": name, "classes": list(classes), **counts, "files": records}


def of_arrays(dataset: Dataset) -> dict[str, Any]:
    """The fingerprint of a data set that is not a folder."""
    made: dict[str, Any] = {"name": dataset.name, "classes": list(dataset.class_names)}
    for part in _PARTS:
        split: Split = getattr(dataset, part)
        made[part] = len(split)
        made[f"{part} labels"] = _hash(split.labels)
        if isinstance(split.images, np.ndarray):
            made[f"{part} images"] = _hash(split.images)
    if dataset.train_numbers is not None:
        made["train numbers"] = _hash(dataset.train_numbers)
    return made


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Says in words how data differ; an empty list says that they do not.

    Args:
        old: The fingerprint of the data before.
        new: That of the data now.
    """
    if old == new:
        return []
    if old["name"] != new["name"]:
        return [f"the data set was {old['name']} and is {new['name']}"]
    said = []
    if "files" in old and "files" in new:
        said += _of_files(old["files"], new["files"])
    else:
        for part in _PARTS:
            if old[part] != new[part]:
                what = "training" if part == "train" else "test"
                said.append(f"there were {old[part]:,} {what} examples, now {new[part]:,}")
        changed = [k for k in sorted({*old, *new}) if " " in k and old.get(k) != new.get(k)]
        said += [f"the {what.replace('train', 'training', 1)} differ" for what in changed]
    if old["classes"] != new["classes"]:
        gone = [name for name in old["classes"] if name not in set(new["classes"])]
        come = [name for name in new["classes"] if name not in set(old["classes"])]
        said += [f"{counted(len(come), 'new class', 'new classes')}: {named(come)}"] if come else []
        said += [f"{counted(len(gone), 'class', 'classes')} less: {named(gone)}"] if gone else []
        said += ["the classes have another order"] if not gone and not come else []
    return said


_PARTS = ("train", "test")


def _hash(array: np.ndarray) -> str:
    array = np.ascontiguousarray(array)
    shape = f"{array.shape} {array.dtype.str} ".encode()
    return digest(shape + digest(array.data.cast("B")).encode())


def _of_files(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    said: dict[str, list[str]] = defaultdict(list)
    added = {name: tuple(new[name]) for name in sorted(new.keys() - old.keys())}
    removed = {name: tuple(old[name]) for name in sorted(old.keys() - new.keys())}
    # The same bytes under another name, and nowhere else: the file was moved.
    here, there = defaultdict(list), defaultdict(list)
    for name, record in removed.items():
        here[record[2:]].append(name)
    for name, record in added.items():
        there[record[2:]].append(name)
    for content, names in here.items():
        if len(names) == len(there[content]) == 1:
            before, now = names[0], there[content][0]
            way = _way(removed.pop(before), added.pop(now)) or "to another name"
            said[f"moved {way}"].append(f"{before} -> {now}")
    said["added"] += added
    said["removed"] += removed
    for name in sorted(old.keys() & new.keys()):
        before, after = tuple(old[name]), tuple(new[name])
        if before[2:] != after[2:]:
            said["changed"].append(name)
        if way := _way(before, after):
            said["relabelled " + way if before[0] == after[0] else "moved " + way].append(name)
    return [
        f"{counted(len(names), 'file')} {what} ({named(names)})"
        for what, names in said.items()
        if names
    ]


def _way(before: tuple, after: tuple) -> str:
    """From which class or part to which; "" if both stayed."""
    ways = []
    if before[1] != after[1]:
        ways.append(f"from {before[1]} to {after[1]}")
    if before[0] != after[0]:
        ways.append(f"from {before[0]} to {after[0]}")
    return " and ".join(ways)
