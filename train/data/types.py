"""What a data set is to the trainer."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from train.data.account import Account
from train.data.images import Fit, Ranges


class DataNotFoundError(FileNotFoundError):
    """The data are not where they were looked for; the message says what to do about it."""


class ImageSource(Protocol):
    """Images that stay on disk, read by number; must be picklable, for the data workers."""

    def __len__(self) -> int:
        """The number of images."""
        ...

    def __getitems__(self, indices: Sequence[int]) -> np.ndarray:
        """Reads and decodes images: ``uint8 [len(indices), h, w, c]``."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images and labels of the training or test part of a data set.

    Attributes:
        images: ``uint8 [n, h, w, c]`` in memory, or a source that reads them from disk.
        labels: ``int32 [n]`` class numbers, or ``int32 [n, num_classes]`` of 0 and 1 where an
            image has several labels.
    """

    images: np.ndarray | ImageSource
    labels: np.ndarray

    def __post_init__(self):
        if len(self.images) != len(self.labels):
            raise ValueError(f"{len(self.images)} images, but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        """Whether `images` is an array."""
        return isinstance(self.images, np.ndarray)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the images of the given numbers: ``uint8 [*indices.shape, h, w, c]``."""
        indices = np.asarray(indices)
        if isinstance(self.images, np.ndarray):
            return self.images[indices]
        flat = self.images.__getitems__(indices.ravel().tolist())
        return flat.reshape(*indices.shape, *flat.shape[1:])

    def take(self, indices: np.ndarray) -> "Split":
        """Returns the split of the given examples, in the given order."""
        indices = np.asarray(indices)
        if isinstance(self.images, np.ndarray):
            return Split(self.images[indices], self.labels[indices])
        return Split(_Chosen(((self.images, indices),)), self.labels[indices])


def concatenate(first: Split, second: Split) -> Split:
    """Appends a split to another: its examples get the numbers from ``len(first)``.

    So a validation set of its own joins the training split for `separate_validation`.
    """
    labels = np.concatenate([first.labels, second.labels])
    if isinstance(first.images, np.ndarray) and isinstance(second.images, np.ndarray):
        return Split(np.concatenate([first.images, second.images]), labels)
    return Split(
        _Chosen(tuple((part.images, np.arange(len(part))) for part in (first, second))), labels
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set for classification, with its training and test splits.

    Attributes:
        name: As given to `load`.
        train: The training split.
        test: The test split, with true labels; empty where there is none.
        num_classes: The number of classes.
        class_names: Their names, in the order of the class numbers.
        image_shape: ``(h, w, c)`` of every image.
        max_value: The largest possible pixel value, 255 but for digits (16).
        multi_label: Whether an image may have several labels.
        validation: A further split with clean labels, where the publisher has one.
        train_files: The file of each training image below the folder, with ``/`` and in the order
            of their names; None where the images are not files.
        test_files: Likewise of each test image.
        held_out: ``int [m]``, the training examples, by position, that a list of labels wants held
            out of the training; None where it does not say.
        train_numbers: ``int [n]``, the number of each training image in the data set as published,
            where a list of labels left some of them out; None for all of them.
        fit: How images of other sizes get `image_shape`.
        ranges: The values that become black and white, by kind of image of more than 8 bits.
        account: What became of every file; of data sets that are not folders, what became of the
            examples where a list of labels was given, otherwise None.
        fingerprint: What tells these data from others; see `train.data.fingerprint`.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    max_value: int = 255
    multi_label: bool = False
    validation: Split | None = None
    train_files: tuple[str, ...] | None = None
    test_files: tuple[str, ...] | None = None
    held_out: np.ndarray | None = None
    train_numbers: np.ndarray | None = None
    fit: Fit = "crop"
    ranges: Ranges = dataclasses.field(default_factory=dict)
    account: Account | None = None
    fingerprint: dict[str, Any] | None = None

    @property
    def train_names(self) -> Sequence[str]:
        """What each training example is called: its file, or its number in the data set."""
        if self.train_files is not None:
            return self.train_files
        numbers = range(len(self.train)) if self.train_numbers is None else self.train_numbers
        return [str(number) for number in numbers]


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Chosen images of several sources, one after the other."""

    parts: tuple[tuple[np.ndarray | ImageSource, np.ndarray], ...]

    def __len__(self) -> int:
        return sum(len(chosen) for _, chosen in self.parts)

    def __getitems__(self, indices: Sequence[int]) -> np.ndarray:
        wanted = np.asarray(indices)
        outside = wanted[(wanted < 0) | (wanted >= len(self))]
        if outside.size:
            raise IndexError(f"no image numbered {outside[0]} of {len(self)}")
        places, images, start = [], [], 0
        for source, chosen in self.parts:
            here = np.flatnonzero((wanted >= start) & (wanted < start + len(chosen)))
            if here.size:
                numbers = chosen[wanted[here] - start]
                places.append(here)
                if isinstance(source, np.ndarray):
                    images.append(source[numbers])
                else:
                    images.append(source.__getitems__(numbers.tolist()))
            start += len(chosen)
        return np.concatenate(images)[np.argsort(np.concatenate(places))]
