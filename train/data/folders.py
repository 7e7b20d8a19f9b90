"""Image files sorted into one folder per class."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from train.data import images
from train.data.types import Dataset, Split, require

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
_IN_MEMORY_BYTES = 2 << 30


def load(folder: pathlib.Path, image_size: int | None = None) -> Dataset:
    """Loads ``FOLDER/train/CLASS/*.png`` and ``FOLDER/test/CLASS/*.png``.

    The classes are the sub-folders of ``train``, numbered in the order of their names; the files
    of each are taken in the order of their names (BMP, JPEG, PNG, WebP). Images are grey if the
    first training image is, otherwise RGB. They stay in memory up to 2 GiB.

    Args:
        folder: The folder with ``train`` and ``test``.
        image_size: Scale the shorter side of each image to this and keep the central square; by
            default the images are taken as they are and must all have one size.

    Raises:
        DataNotFoundError: if a folder is missing.
        ValueError: if there are no images, a test class is not a training class, or the images
            have different sizes and `image_size` is not given.
    """
    remedy = f"A folder of images needs {folder}/train/CLASS/*.png and {folder}/test/CLASS/*.png"
    roots = {split: require(folder / split, remedy) for split in ("train", "test")}
    class_names = _class_names(roots["train"])
    if not class_names:
        raise ValueError(f"{roots['train']} has no sub-folders. {remedy}")
    if unknown := sorted(set(_class_names(roots["test"])) - set(class_names)):
        raise ValueError(f"{roots['test']} has classes that train has not: {', '.join(unknown)}")

    found = {split: _files(root, class_names) for split, root in roots.items()}
    for split, (paths, _) in found.items():
        if not paths:
            raise ValueError(f"{roots[split]} holds no images ({', '.join(sorted(_SUFFIXES))})")
    with Image.open(found["train"][0][0]) as first:
        channels = 1 if first.mode in ("1", "L", "I;16") else 3
    if image_size is None:
        height, width = _common_size([p for paths, _ in found.values() for p in paths])
    else:
        height = width = image_size

    def make(paths: list[pathlib.Path], labels: np.ndarray) -> Split:
        source = Files(tuple(paths), (height, width, channels), image_size)
        if len(paths) * math.prod(source.shape) <= _IN_MEMORY_BYTES:
            return Split(source.__getitems__(range(len(paths))), labels)
        return Split(source, labels)

    return Dataset(
        name="folder",
        train=make(*found["train"]),
        test=make(*found["test"]),
        num_classes=len(class_names),
        class_names=class_names,
        image_shape=(height, width, channels),
        train_files=tuple(str(path.relative_to(folder)) for path in found["train"][0]),
    )


@dataclasses.dataclass(frozen=True)
class Files:
    """Images in files, decoded when they are read.

    Attributes:
        paths: The files.
        shape: ``(h, w, c)`` of the decoded images.
        image_size: The size to scale to, or None to take the images as they are.
    """

    paths: tuple[pathlib.Path, ...]
    shape: tuple[int, int, int]
    image_size: int | None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: Sequence[int]) -> np.ndarray:
        decoded = np.empty((len(indices), *self.shape), np.uint8)
        for image, index in zip(decoded, indices, strict=True):
            image[:] = images.decode(self.paths[index], self.shape[2], self.image_size)
        return decoded


def _class_names(root: pathlib.Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in root.iterdir() if path.is_dir()))


def _files(
    root: pathlib.Path, class_names: tuple[str, ...]
) -> tuple[list[pathlib.Path], np.ndarray]:
    paths, labels = [], []
    for label, name in enumerate(class_names):
        of_class = root / name
        if of_class.is_dir():
            files = sorted(p for p in of_class.iterdir() if p.suffix.lower() in _SUFFIXES)
            paths += files
            labels += [label] * len(files)
    return paths, np.array(labels, np.int32)


def _common_size(paths: list[pathlib.Path]) -> tuple[int, int]:
    """Height and width of all images, from their headers."""
    common = None
    for path in paths:
        with Image.open(path) as image:
            size = (image.height, image.width)
        if common is None:
            common = size
        if size != common:
            raise ValueError(
                f"{path} is {size[0]}x{size[1]} (height x width), {paths[0]} {common[0]}x"
                f"{common[1]}: give --image-size N (image_size) to scale and crop all images to "
                "N x N"
            )
    assert common is not None
    return common
