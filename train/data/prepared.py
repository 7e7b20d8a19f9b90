"""Data sets that TFDS prepares once as array_record files; reading needs no TensorFlow."""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from train.data import images
from train.data.types import DataNotFoundError, Dataset, Split


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a data set is prepared and read.

    Attributes:
        builder: The name of the TFDS builder.
        train: The TFDS split to train on.
        test: The TFDS split to test on.
        validation: A further clean split, if any.
        archives: The files that the publisher hands out, under the names that TFDS expects.
        downloads: Whether TFDS can fetch the archives itself.
        image_size: The side of the decoded square images; None where all images have one size
            (they are then few enough to stay in memory).
        fit: How images of different sizes become square.
        label: The feature that holds the label, or the labels.
        needs_tensorflow: Whether preparing does.
    """

    builder: str
    train: str
    test: str
    archives: tuple[str, ...]
    validation: str | None = None
    downloads: bool = True
    image_size: int | None = None
    fit: images.Fit = "crop"
    label: str = "label"
    needs_tensorflow: bool = True


_IDX = tuple(
    f"{part}-{kind}-ubyte.gz"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
_CLOTHING1M = Recipe(
    builder="clothing1m",
    train="noisy_train",
    test="clean_test",
    validation="clean_val",
    archives=(
        "noisy_train_key_list.txt",
        "clean_train_key_list.txt",
        "clean_val_key_list.txt",
        "clean_test_key_list.txt",
        "noisy_label_kv.txt",
        "clean_label_kv.txt",
        "images",
    ),
    downloads=False,
    image_size=256,
    needs_tensorflow=False,
)
RECIPES = {
    "mnist": Recipe("mnist", "train", "test", _IDX),
    "fashion_mnist": Recipe("fashion_mnist", "train", "test", _IDX),
    "cifar10": Recipe("cifar10", "train", "test", ("cifar-10-binary.tar.gz",)),
    "cifar100": Recipe("cifar100", "train", "test", ("cifar-100-binary.tar.gz",)),
    "imagenet2012": Recipe(
        builder="imagenet2012",
        train="train",
        test="validation",
        archives=("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"),
        downloads=False,
        image_size=256,
    ),
    "voc/2007": Recipe(
        builder="voc/2007",
        train="train+validation",
        test="test",
        archives=("VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar"),
        # Crops keep 30% to 100% of the whole image: nothing may be cut off before, and a crop of
        # 30% has 210 x 210 pixels.
        image_size=384,
        fit="squash",
        label="labels",
    ),
    "clothing1m": _CLOTHING1M,
    "clothing1m/clean": dataclasses.replace(_CLOTHING1M, train="clean_train"),
}


def load(name: str, data_dir: pathlib.Path | None, image_size: int | None = None) -> Dataset:
    """Loads a data set that `prepare` has prepared.

    Args:
        name: A key of `RECIPES`.
        data_dir: TFDS's data folder; by default its own, ``~/tensorflow_datasets``.
        image_size: Another side for the images of data sets whose images differ in size.

    Raises:
        DataNotFoundError: if the data set is not prepared there as array_record.
        ValueError: if `image_size` is given for a data set of fixed-size images.
    """
    recipe = RECIPES[name]
    if image_size is not None and recipe.image_size is None:
        raise ValueError(f"the images of {name} all have one size: image_size does not apply")
    builder = _builder(recipe, data_dir)
    if not builder.data_path.exists():
        raise DataNotFoundError(
            f"{name} is not prepared in {builder.data_path}. {remedy(name, data_dir)}"
        )
    directory = pathlib.Path(builder.data_path)
    feature = builder.info.features[recipe.label]
    multi_label = recipe.label == "labels"
    classes = feature.feature if multi_label else feature
    shape = tuple(builder.info.features["image"].shape)
    size = image_size or recipe.image_size
    if size is not None:
        shape = (size, size, shape[2])

    def split(tfds_split: str) -> Split:
        source = Records(directory, tfds_split, shape, recipe.fit)
        length = len(source)
        labels = _kept(
            directory / f"{tfds_split}-{recipe.label}.npy",
            length,
            lambda: _labels(source, recipe.label, classes.num_classes if multi_label else None),
        )
        if size is not None:
            return Split(source, labels)
        decoded = _kept(
            directory / f"{tfds_split}-image.npy",
            length,
            lambda: source.__getitems__(range(length)),
        )
        return Split(decoded, labels)

    train, test = split(recipe.train), split(recipe.test)
    return Dataset(
        name=name,
        train=train,
        test=test,
        validation=split(recipe.validation) if recipe.validation else None,
        num_classes=classes.num_classes,
        class_names=tuple(classes.names),
        image_shape=shape,
        fit=recipe.fit,
        multi_label=multi_label,
    )


def prepare(
    name: str, data_dir: pathlib.Path | None = None, archives: pathlib.Path | None = None
) -> pathlib.Path:
    """Prepares a data set with TFDS, as array_record; TFDS verifies the archives' checksums.

    Args:
        name: A key of `RECIPES`.
        data_dir: TFDS's data folder; by default its own, ``~/tensorflow_datasets``.
        archives: The folder with the files `Recipe.archives`; by default TFDS downloads them.

    Returns:
        The folder that holds the prepared files.

    Raises:
        ImportError: if TensorFlow is needed and missing.
        DataNotFoundError: if archives are missing or cannot be downloaded.
    """
    recipe = RECIPES[name]
    if recipe.needs_tensorflow and importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            f"preparing {name} needs TensorFlow (training does not): pip install -e '.[prepare]'"
        )
    if archives is None and not recipe.downloads:
        raise DataNotFoundError(f"{name} cannot be downloaded by program. {remedy(name, data_dir)}")
    if archives is not None:
        missing = [file for file in recipe.archives if not (archives / file).exists()]
        if missing:
            raise DataNotFoundError(
                f"{archives} lacks {', '.join(missing)}. {remedy(name, data_dir)}"
            )
    import requests

    builder = _builder(recipe, data_dir)
    config = _tfds().download.DownloadConfig(manual_dir=archives)
    try:
        builder.download_and_prepare(download_config=config)
    except requests.RequestException as error:
        raise DataNotFoundError(
            f"{name} could not be downloaded: {error}. {remedy(name, data_dir)}"
        ) from error
    load(name, data_dir)  # writes what `_kept` keeps, which takes long for large data sets
    return pathlib.Path(builder.data_path)


def command(name: str, data_dir: str | pathlib.Path | None) -> str:
    """The command that prepares a data set in a data folder."""
    where = "" if data_dir is None else f" --data-dir {shlex.quote(str(data_dir))}"
    return f"python -m train prepare {name}{where}"


def remedy(name: str, data_dir: pathlib.Path | None) -> str:
    """What to do if a data set is missing."""
    recipe = RECIPES[name]
    files = ", ".join(recipe.archives)
    prepare = command(name, data_dir)
    archives = f"put {files} into a folder ARCHIVES and run: {prepare} --archives ARCHIVES"
    if not recipe.downloads:
        return f"Get the archives from their publisher, {archives}"
    return f"Run: {prepare} (downloads it); or {archives}"


@dataclasses.dataclass(frozen=True)
class Records:
    """Images in array_record files that TFDS prepared, decoded when they are read.

    Attributes:
        directory: The folder of the prepared files.
        split: The TFDS split.
        shape: ``(h, w, c)`` of the decoded images.
        fit: How they get it.
    """

    directory: pathlib.Path
    split: str
    shape: tuple[int, int, int]
    fit: images.Fit

    @functools.cached_property
    def _records(self) -> Any:
        tfds = _tfds()
        return tfds.builder_from_directory(self.directory).as_data_source(
            self.split, decoders={"image": tfds.decode.SkipDecoding()}
        )

    def __len__(self) -> int:
        return len(self._records)

    def __getstate__(self) -> dict:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # files reopen

    def __getitems__(self, indices: Sequence[int]) -> np.ndarray:
        records = self._records.__getitems__(list(indices))
        return np.stack([self._decode(*pair) for pair in zip(indices, records, strict=True)])

    def _decode(self, index: int, record: dict) -> np.ndarray:
        try:
            return images.decode(record["image"], self.shape, self.fit)
        except ValueError as error:
            raise ValueError(
                f"image {index} of {self.split} in {self.directory}: {error}"
            ) from error

    def feature(self, name: str) -> list:
        """Reads one feature of all examples."""
        return [self._records[i][name] for i in range(len(self))]


def _builder(recipe: Recipe, data_dir: pathlib.Path | None) -> Any:
    make: Any = functools.partial(_tfds().builder, recipe.builder)
    if recipe.builder == "clothing1m":
        from train.data import clothing1m

        make = clothing1m.Clothing1m
    try:
        return make(data_dir=data_dir, file_format="array_record")
    except ValueError as error:
        if "File format is already set" not in str(error):
            raise
        raise DataNotFoundError(
            f"{recipe.builder} is prepared in {data_dir or 'the default data folder'}, but not as "
            "array_record, which random access needs. Prepare it in another data folder: "
            f"{command(recipe.builder, 'DIR')}"
        ) from error


def _tfds() -> Any:
    """TFDS, imported when it is needed; its decorators hide signatures from type checkers."""
    import tensorflow_datasets

    return tensorflow_datasets


def _labels(source: Records, feature: str, num_classes: int | None) -> np.ndarray:
    """The labels of a split; multi-hot where `num_classes` is given."""
    values = source.feature(feature)
    if num_classes is None:
        return np.array(values, np.int32)
    labels = np.zeros((len(values), num_classes), np.int32)
    for row, of_image in zip(labels, values, strict=True):
        row[np.asarray(of_image, np.int64)] = 1
    return labels


def _kept(path: pathlib.Path, length: int, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array kept in a file beside the records, made if it is not there yet.

    Reading the labels from the records reads every image, and decoding 60,000 small PNG images
    takes many seconds.
    """
    if path.exists():
        array = np.load(path)
        if len(array) == length:
            return array
    array = make()
    if os.access(path.parent, os.W_OK):
        partial = path.with_suffix(f".{os.getpid()}")
        with open(partial, "wb") as file:
            np.save(file, array)
        partial.replace(path)
    return array
