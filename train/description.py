"""What a run knows of its data without having them: ``data.json`` of its directory."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from train.config import Config
from train.data import fingerprint
from train.data.images import Fit
from train.files import write_json
from train.mesh import Layout
from train.program import Program, build


class NoDescriptionError(ValueError):
    """A run directory without data.json."""


@dataclasses.dataclass(frozen=True)
class Description:
    """The data of a run.

    Attributes:
        dataset: the name of the data set.
        class_names: in the order of the class numbers.
        image_shape: ``(h, w, c)``.
        max_value: the largest possible pixel value.
        multi_label: whether an image may have several labels.
        network: the network that is trained.
        steps_per_epoch: number of steps.
        train, held_out: names of the examples trained on and of those held out, in the order of
            the positions of the evidence: files or, where there are none, numbers.
        labels: the given labels of these, class numbers; None with several labels per example.
        own_labels: the data set's own, where the given ones were changed on purpose; else None.
        counts: "train", "held_out" and "test" to the number of examples of each class.
        fit, ranges: how images of other sizes and depths become such (`train.data.images`).
        has_files: whether the names are files.
        fingerprint: of the whole data set (`train.data.fingerprint`).
    """

    dataset: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    max_value: int
    multi_label: bool
    network: str
    steps_per_epoch: int
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    labels: tuple[int, ...] | None
    own_labels: tuple[int, ...] | None
    counts: dict[str, dict[str, int]]
    fit: Fit
    ranges: dict[str, list[float]]
    has_files: bool
    fingerprint: dict[str, Any] | None

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all examples, in the order of the positions of the evidence."""
        return self.train + self.held_out

    @classmethod
    def of(cls, problem: Any) -> "Description":
        """Of a `train.problem.Problem`."""
        dataset = problem.dataset
        count = len(dataset.train)
        parts = {"train": dataset.train, "test": dataset.test}
        if problem.held_out is not None:
            parts["held_out"] = problem.held_out
        labels = own = None
        if not dataset.multi_label:
            labels = _joined(
                *(parts[name].labels for name in ("train", "held_out") if name in parts)
            )
        if problem.true is not None:
            own = _joined(problem.true, problem.held_out_true)
        return cls(
            dataset=dataset.name,
            class_names=tuple(dataset.class_names),
            image_shape=tuple(dataset.image_shape),
            max_value=dataset.max_value,
            multi_label=dataset.multi_label,
            network=problem.network,
            steps_per_epoch=problem.order.steps_per_epoch,
            train=problem.names[:count],
            held_out=problem.names[count:],
            labels=labels,
            own_labels=own,
            counts={
                name: dict(zip(dataset.class_names, _counts(split.labels, dataset), strict=True))
                for name, split in parts.items()
            },
            fit=dataset.fit,
            ranges={kind: list(values) for kind, values in dataset.ranges.items()},
            has_files=dataset.train_files is not None,
            fingerprint=dataset.fingerprint,
        )

    @classmethod
    def read(cls, directory: pathlib.Path) -> "Description":
        """From a run directory.

        Raises:
            NoDescriptionError: if there is none.
        """
        file = directory / "data.json"
        if not file.exists():
            raise NoDescriptionError(
                f"{directory} has no data.json, which says what the run was trained on: the run "
                "has not begun, or is of an earlier version; train it again in another folder"
            )
        fields = json.loads(file.read_text())
        for name in ("class_names", "image_shape", "train", "held_out", "labels", "own_labels"):
            if fields[name] is not None:
                fields[name] = tuple(fields[name])
        return cls(**fields)

    def write(self, directory: pathlib.Path) -> None:
        """Into a run directory, all or nothing."""
        write_json(directory / "data.json", dataclasses.asdict(self))

    def differences(self, other: "Description") -> list[str]:
        """How the data that `other` describes differ from these, in words; empty if they do not."""
        found = []
        if self.fingerprint is not None and other.fingerprint is not None:
            found = fingerprint.differences(self.fingerprint, other.fingerprint)
        if not found and self.image_shape != other.image_shape:
            found = [f"the images were {self.image_shape} and are {other.image_shape}"]
        if not found and (self.names, self.labels) != (other.names, other.labels):
            found = ["the training examples or their given labels are others"]
        return found

    def program(self, config: Config, layout: Layout | None = None) -> Program:
        """The compiled functions of a run on such data; needs no data."""
        return build(
            dataclasses.replace(config, network=self.network),
            image_shape=self.image_shape,
            max_value=self.max_value,
            num_classes=self.num_classes,
            multi_label=self.multi_label,
            steps_per_epoch=self.steps_per_epoch,
            layout=layout,
            num_train=len(self.train),
            num_held_out=len(self.held_out),
        )


def _joined(*labels: np.ndarray | None) -> tuple[int, ...]:
    return tuple(np.concatenate([each for each in labels if each is not None]).tolist())


def _counts(labels: np.ndarray, dataset: Any) -> list[int]:
    if labels.ndim == 2:
        return labels.sum(axis=0).tolist()
    return np.bincount(labels, minlength=dataset.num_classes).tolist()
