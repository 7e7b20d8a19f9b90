"""Folders of IDX files."""

import gzip
import struct

import numpy as np
import pytest

from tests.train.known import in_memory
from train import data


@pytest.fixture
def idx(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 7), ("t10k", 3)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 4, 5), np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, n, np.uint8)
    for name, array in arrays.items():
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        content = header + array.tobytes()
        # Both forms are found, also side by side.
        if "labels" in name:
            (tmp_path / name).write_bytes(content)
        else:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    return tmp_path, arrays


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_folder(idx, name):
    folder, arrays = idx
    loaded = data.load(name, folder)
    assert (loaded.name, loaded.num_classes, loaded.max_value) == (name, 10, 255)
    assert loaded.image_shape == (4, 5, 1)
    for part, split in (("train", loaded.train), ("t10k", loaded.test)):
        np.testing.assert_array_equal(in_memory(split)[..., 0], arrays[f"{part}-images-idx3-ubyte"])
        np.testing.assert_array_equal(split.labels, arrays[f"{part}-labels-idx1-ubyte"])
        assert split.labels.dtype == np.int32
    assert data.load("fashion_mnist", folder).class_names[9] == "Ankle boot"


def break_idx(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-labels-idx1-ubyte", lambda b: b[:-1], "should hold 7 = 7 bytes, but has 6"),
        ("train-labels-idx1-ubyte", lambda b: b"", "it starts with nothing, expected 00 00 08 01"),
        ("train-labels-idx1-ubyte", lambda b: b"\x1f" + b[1:], "not an IDX file .* 1f 00 08 01"),
        ("train-labels-idx1-ubyte", lambda b: b[:-1] + b"\x0a", "label 10, but mnist has the clas"),
        (
            "t10k-labels-idx1-ubyte",
            lambda b: b[:4] + struct.pack(">I", 2) + b[8:10],
            "has 3 images, .* 2 labels",
        ),
        ("t10k-images-idx3-ubyte.gz", lambda b: b[:40], "is not a complete gzip file"),
        ("t10k-images-idx3-ubyte.gz", lambda b: b"x" + b, "is not a complete gzip file"),
        (
            "t10k-images-idx3-ubyte.gz",
            lambda b: gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", 3, 1, 1) + b"abc"),
            "training and test images have different sizes",
        ),
    ],
)
def test_damaged_idx_file(idx, name, change, message):
    folder, _ = idx
    break_idx(folder, name, change)
    with pytest.raises(ValueError, match=message):
        data.load("mnist", folder)


def test_missing_idx_file(idx):
    folder, _ = idx
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(data.DataNotFoundError, match=r"lacks t10k-labels-idx1-ubyte \(or t10k-lab"):
        data.load("mnist", folder)
