import subprocess
import sys

import numpy as np
import pytest

from tests.train.known import in_memory
from train import data


class Numbered:
    """Images on disk, as it were: image i is filled with i."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitems__(self, indices):
        assert all(type(i) is int and 0 <= i < self.n for i in indices)
        return np.tile(np.asarray(indices, np.uint8)[:, None, None, None], (1, 2, 3, 1))


def test_digits():
    digits = data.load("digits")
    assert digits.image_shape == (8, 8, 1)
    assert digits.max_value == 16
    assert (digits.num_classes, digits.class_names[3]) == (10, "3")
    for split, n in ((digits.train, 1200), (digits.test, 597)):
        assert in_memory(split).shape == (n, 8, 8, 1)
        assert in_memory(split).dtype == np.uint8
        assert split.labels.shape == (n,)
        assert split.labels.dtype == np.int32
        assert in_memory(split).max() == 16
        assert split.in_memory
    # All 1,797 images are there once, and the split never changes.
    everything = np.concatenate([in_memory(digits.train), in_memory(digits.test)]).reshape(1797, -1)
    assert len(np.unique(everything, axis=0)) == 1797
    np.testing.assert_array_equal(
        np.bincount(digits.test.labels), [61, 62, 68, 53, 65, 63, 62, 49, 54, 60]
    )


def test_digits_import_nothing_heavy():
    code = (
        "import sys; from train import data; data.load('digits'); "
        "print({'tensorflow', 'tensorflow_datasets', 'grain', 'jax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown data set 'digit'; known: .*digits.*mnist"):
        data.load("digit")


def test_split_reads_from_memory_and_from_a_source_alike():
    labels = np.arange(6, dtype=np.int32)
    source = data.Split(Numbered(6), labels)
    memory = data.Split(Numbered(6).__getitems__(list(range(6))), labels)
    assert not source.in_memory
    indices = np.array([[5, 0], [2, 2]], np.int32)
    assert source.read(indices).shape == (2, 2, 2, 3, 1)
    np.testing.assert_array_equal(source.read(indices), memory.read(indices))
    np.testing.assert_array_equal(source.read(indices)[..., 0, 0, 0], indices)


@pytest.mark.parametrize("in_memory", [True, False])
def test_take_and_concatenate(in_memory):
    def split(n):
        images = Numbered(n)
        if in_memory:
            images = images.__getitems__(list(range(n)))
        return data.Split(images, np.arange(n, dtype=np.int32))

    joined = data.concatenate(split(4).take(np.array([3, 1])), split(3))
    assert len(joined) == 5
    assert joined.in_memory == in_memory
    np.testing.assert_array_equal(joined.labels, [3, 1, 0, 1, 2])
    np.testing.assert_array_equal(
        joined.read(np.array([4, 0, 1, 3, 0]))[..., 0, 0, 0], [2, 3, 1, 1, 3]
    )
    np.testing.assert_array_equal(joined.take(np.array([4, 0])).labels, [2, 3])


def test_concatenate_memory_and_source():
    memory = data.Split(np.full((2, 2, 3, 1), 9, np.uint8), np.zeros(2, np.int32))
    joined = data.concatenate(memory, data.Split(Numbered(3), np.arange(3, dtype=np.int32)))
    np.testing.assert_array_equal(joined.read(np.array([2, 1, 4]))[..., 0, 0, 0], [0, 9, 2])
    with pytest.raises(IndexError, match="no image numbered 5"):
        joined.read(np.array([1, 5]))


def test_labels_and_images_must_match():
    with pytest.raises(ValueError, match="3 images, but 2 labels"):
        data.Split(Numbered(3), np.zeros(2, np.int32))
