"""MNIST's own file format, read from a folder without preparing anything."""

import gzip
import math
import pathlib
import struct
import zlib

import numpy as np

from train.data.types import DataNotFoundError, Dataset, Split

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def is_idx_folder(folder: pathlib.Path) -> bool:
    """Whether any of the four files, gzipped or not, is in the folder."""
    stems = [stem for pair in _FILES.values() for stem in pair]
    return any((folder / f"{stem}{end}").exists() for stem in stems for end in ("", ".gz"))


def load(name: str, folder: pathlib.Path, class_names: tuple[str, ...]) -> Dataset:
    """Loads a data set from its four IDX files, gzipped or not.

    Args:
        name: The name that the data set is to have.
        folder: Holds ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
            ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``, each maybe with ``.gz``.
        class_names: The names of the classes 0, 1, ...

    Raises:
        DataNotFoundError: if one of the files is missing.
        ValueError: if a file is not in the format, or the files do not fit together.
    """
    splits = {}
    for split, (images_stem, labels_stem) in _FILES.items():
        images_path, labels_path = _find(folder, images_stem), _find(folder, labels_stem)
        images, labels = _read(images_path, 3), _read(labels_path, 1)
        if len(images) != len(labels):
            raise ValueError(
                f"{images_path} has {len(images)} images, {labels_path} {len(labels)} labels"
            )
        if labels.size and labels.max() >= len(class_names):
            raise ValueError(
                f"{labels_path} has the label {labels.max()}, but {name} has the classes "
                f"0..{len(class_names) - 1}"
            )
        splits[split] = Split(images[..., None], labels.astype(np.int32))
    image_shape = splits["train"].images.shape[1:]
    if splits["test"].images.shape[1:] != image_shape:
        raise ValueError(f"{folder}: training and test images have different sizes")
    return Dataset(
        name=name,
        train=splits["train"],
        test=splits["test"],
        num_classes=len(class_names),
        class_names=class_names,
        image_shape=image_shape,
    )


def _find(folder: pathlib.Path, stem: str) -> pathlib.Path:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.exists():
            return path
    raise DataNotFoundError(f"{folder} lacks {stem} (or {stem}.gz), one of the four IDX files")


def _read(path: pathlib.Path, rank: int) -> np.ndarray:
    """Reads an IDX file of bytes: 0, 0, type 8, rank, the sizes as big-endian int32, the data."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}") from error
    start = 4 + 4 * rank
    if len(data) < start or data[:4] != bytes([0, 0, 8, rank]):
        raise ValueError(
            f"{path} is not an IDX file of bytes with {rank} axes: it starts with "
            f"{data[:4].hex(' ') or 'nothing'}, expected 00 00 08 {rank:02x}"
        )
    shape = struct.unpack(f">{rank}I", data[4:start])
    if len(data) - start != math.prod(shape):
        raise ValueError(
            f"{path} should hold {' x '.join(map(str, shape))} = {math.prod(shape)} bytes, but "
            f"has {len(data) - start}"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
