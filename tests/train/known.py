"""What a type leaves open and a test knows."""

from typing import TypeVar

import numpy as np

from train.data import Split

T = TypeVar("T")


def some(value: T | None) -> T:
    """The value, which is there."""
    assert value is not None
    return value


def in_memory(split: Split) -> np.ndarray:
    """The images of a split, which are in memory."""
    assert isinstance(split.images, np.ndarray)
    return split.images
