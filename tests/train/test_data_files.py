"""Folders of IDX files and of images."""

import gzip
import struct

import numpy as np
import pytest
from PIL import Image

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
        np.testing.assert_array_equal(split.images[..., 0], arrays[f"{part}-images-idx3-ubyte"])
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


def write_images(folder, mode="RGB", size=(6, 4), suffix="png"):
    """One image per file, filled with a value of its own; width 6, height 4."""
    value = 0
    for split, counts in (("train", {"cat": 3, "ant": 2}), ("test", {"cat": 1})):
        for name, n in counts.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                value += 10
                Image.new("RGB", size, (value, 0, 255)).convert(mode).save(
                    folder / split / name / f"{i}.{suffix}"
                )
    (folder / "train" / "cat" / "notes.txt").write_text("not an image")


def test_folder_of_images(tmp_path):
    write_images(tmp_path)
    loaded = data.load("folder", tmp_path)
    assert loaded.class_names == ("ant", "cat")
    assert loaded.image_shape == (4, 6, 3)
    np.testing.assert_array_equal(loaded.train.labels, [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(loaded.test.labels, [1])
    assert loaded.train.in_memory
    np.testing.assert_array_equal(loaded.train.images[:, 3, 5, 0], [40, 50, 10, 20, 30])
    np.testing.assert_array_equal(loaded.test.images[0, 0, 0], [60, 0, 255])


def test_folder_of_grey_images(tmp_path):
    write_images(tmp_path, mode="L")
    assert data.load("folder", tmp_path).image_shape == (4, 6, 1)


def test_folder_scales_and_crops(tmp_path):
    write_images(tmp_path)
    # Left half black, right half white: the central 4 x 4 of 4 x 8, doubled.
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 4:] = 255
    Image.fromarray(wide).save(tmp_path / "test" / "cat" / "0.png")
    image = data.load("folder", tmp_path, image_size=8).test.images[0, :, :, 0]
    assert image.shape == (8, 8)
    np.testing.assert_array_equal(image[:, :3], 0)
    np.testing.assert_array_equal(image[:, 5:], 255)


def test_large_folders_stay_on_disk(tmp_path, monkeypatch):
    write_images(tmp_path)
    monkeypatch.setattr("train.data.folders._IN_MEMORY_BYTES", 100)
    loaded = data.load("folder", tmp_path)
    assert not loaded.train.in_memory
    np.testing.assert_array_equal(loaded.train.read(np.array([[4, 0]]))[..., 0, 0, 0], [[30, 40]])
    (tmp_path / "train" / "cat" / "2.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(ValueError, match=r"cat/2\.png cannot be decoded as an image"):
        loaded.train.read(np.array([4]))


def test_folder_of_different_sizes(tmp_path):
    write_images(tmp_path)
    Image.new("RGB", (9, 4)).save(tmp_path / "train" / "cat" / "7.png")
    with pytest.raises(ValueError, match=r"7\.png is 4x9 .*0\.png 4x6: give --image-size N"):
        data.load("folder", tmp_path)
    assert data.load("folder", tmp_path, image_size=4).train.images.shape == (6, 4, 4, 3)


def test_incomplete_folders(tmp_path):
    with pytest.raises(ValueError, match="needs data_dir"):
        data.load("folder")
    with pytest.raises(
        data.DataNotFoundError, match=r"train does not exist\. A folder of images n"
    ):
        data.load("folder", tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "test" / "dog").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no sub-folders"):
        data.load("folder", tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(ValueError, match="test has classes that train has not: dog"):
        data.load("folder", tmp_path)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "cat")
    with pytest.raises(ValueError, match="train holds no images"):
        data.load("folder", tmp_path)
