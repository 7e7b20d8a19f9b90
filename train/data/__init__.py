"""Data sets by name.

The heavy packages that some of them need (TFDS, grain, TensorFlow) are imported when they are
used: `digits` needs none.
"""

import dataclasses
import pathlib
from collections.abc import Callable

from train.data import digits, fingerprint, folders, idx, prepared
from train.data import labels as label_lists
from train.data.stream import batches, in_order
from train.data.types import DataNotFoundError, Dataset, ImageSource, Split, concatenate

__all__ = [
    "NAMES",
    "DataNotFoundError",
    "Dataset",
    "ImageSource",
    "Split",
    "batches",
    "concatenate",
    "in_order",
    "load",
    "prepare",
]

_MNIST_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion_mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
}

NAMES = ("digits", *prepared.RECIPES, "folder")
"""The names that `load` knows."""


def load(
    name: str,
    data_dir: str | pathlib.Path | None = None,
    *,
    image_size: int | None = None,
    labels: str | pathlib.Path | None = None,
    bad_files: folders.BadFiles = "error",
    on_file: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """Loads a data set.

    ::

        name                  images      train / test
        digits                8x8x1       1,200 / 597; scikit-learn's, nothing to prepare
        mnist, fashion_mnist  28x28x1     60,000 / 10,000; prepared, or a folder of IDX files
        cifar10, cifar100     32x32x3     50,000 / 10,000
        imagenet2012          256x256x3   1,281,167 / 50,000 (its validation set)
        voc/2007              384x384x3   5,011 (train and validation) / 4,952, several labels
        clothing1m            256x256x3   noisy 1,000,000 / clean test 10,526
        clothing1m/clean      256x256x3   clean 47,570 / clean test 10,526
        folder                any         a folder of pictures

    Images of ImageNet and Clothing1M are scaled to 256 along the shorter side and cropped to the
    central square; the crops that training takes are made from that. Those of VOC are scaled to a
    square as a whole, which changes their aspect ratio, as the 227x227 crops do anyway. An image
    of VOC has every class of which an object is annotated, "difficult" ones included; the
    official evaluation leaves those out of account. Clothing1M has its 14,313 clean validation
    images as `validation`.

    A folder of pictures is one of ::

        FOLDER/CLASS/...                             every picture is for training
        FOLDER/train/CLASS/... FOLDER/test/CLASS/... the test part may be missing
        FOLDER/... FOLDER/labels.csv                 columns file,label and perhaps split

    Pictures may lie at any depth below their class and be PNG, JPEG, WebP, BMP, GIF, TIFF or PPM
    files. Hidden and system entries, and files that are no pictures, are skipped. ``val`` or
    ``valid`` serves as test part where there is no ``test``. Classes and files are in the order of
    their names. `Dataset.account` says what became of every file.

    - Size: as the files have it where that is one size and its shorter side is at most 256.
      Otherwise the shorter side is scaled and the central square kept: of side `image_size`, or
      else the median of the shorter sides, so that half of the pictures lose nothing by being
      enlarged, but at most 64, which a CPU trains in minutes.
    - Grey if all pictures are stored as grey, otherwise RGB.
    - Turned upright by their EXIF data; transparent parts on white; the first frame of several.
    - Values of more than 8 bits are scaled to 0..255: 0, or the least value of all files where that
      is negative, becomes black, and the greatest value of all files white. "Of all files": of the
      same kind (16-bit grey, 16-bit colour, 32-bit grey, floating-point), so that pictures remain
      comparable.
    - Images stay in memory up to 2 GiB a part, otherwise they are read from the files again.

    Args:
        name: One of `NAMES`.
        data_dir: Where the data are: TFDS's data folder (by default ``~/tensorflow_datasets``),
            for mnist and fashion_mnist also a folder of IDX files, for folder the folder itself.
        image_size: Another side of the square that images of different sizes are brought to.
        labels: A CSV file that replaces the labels of training examples; those that it lacks are
            left out. For folders its columns are those of ``FOLDER/labels.csv``, and test pictures
            that it lacks keep their labels; for other data sets they are ``example``, the number in
            the training split, and ``label``, the class by name.
        bad_files: What to do if files of a folder cannot be read: "error" lists them, "skip" goes
            on without them.
        on_file: Called while the files of a folder are read, with the number done and of all.

    Raises:
        ValueError: if the name is unknown, or as the loaders do for damaged data.
        DataNotFoundError: if the data are not there; says what to do.
    """
    _check_name(name, NAMES)
    folder = None if data_dir is None else pathlib.Path(data_dir).expanduser()
    corrections = None if labels is None else pathlib.Path(labels).expanduser()
    if name == "folder":
        if folder is None:
            raise ValueError("the data set 'folder' needs data_dir, the folder of pictures")
        return folders.load(
            folder, image_size, labels_path=corrections, bad_files=bad_files, on_file=on_file
        )
    if bad_files != "error":
        raise ValueError(f"bad_files = {bad_files} is for folders of pictures, not for {name}")
    dataset = _load_named(name, folder, image_size)
    if corrections is not None:
        dataset = label_lists.correct(dataset, corrections)
    return dataclasses.replace(dataset, fingerprint=fingerprint.of_arrays(dataset))


def _load_named(name: str, folder: pathlib.Path | None, image_size: int | None) -> Dataset:
    if image_size is not None and name in ("digits", *_MNIST_NAMES):
        raise ValueError(f"the images of {name} all have one size: image_size does not apply")
    if name == "digits":
        return digits.load()
    if name in _MNIST_NAMES and folder is not None and idx.is_idx_folder(folder):
        return idx.load(name, folder, _MNIST_NAMES[name])
    return prepared.load(name, folder, image_size)


def prepare(
    name: str,
    data_dir: str | pathlib.Path | None = None,
    archives: str | pathlib.Path | None = None,
) -> pathlib.Path:
    """Prepares a data set once, with TFDS, as array_record files for random access.

    Args:
        name: One of `NAMES` but digits and folder, which need no preparing.
        data_dir: TFDS's data folder, by default ``~/tensorflow_datasets``.
        archives: A folder with the archives as their publishers hand them out; without it TFDS
            downloads them, where it can (not imagenet2012 and clothing1m).

    Returns:
        The folder that holds the prepared files.

    Raises:
        ValueError: if the name is unknown.
        ImportError: if TensorFlow is missing, which training does not need.
        DataNotFoundError: if archives are missing or cannot be downloaded.
    """
    if name in ("digits", "folder"):
        raise ValueError(f"{name} needs no preparing")
    _check_name(name, tuple(prepared.RECIPES))
    return prepared.prepare(
        name,
        None if data_dir is None else pathlib.Path(data_dir).expanduser(),
        None if archives is None else pathlib.Path(archives).expanduser(),
    )


def _check_name(name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(known)}")
