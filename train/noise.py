"""Label noise and pixel permutations, seeded, for the training split alone.

The two conventions in the literature differ, and every table must say which one it uses:

- ``symmetric`` always flips to a wrong class. This paper (section 5.3: "randomly choose a
  fraction of π examples per class and uniformly assign labels of the other c - 1 classes"),
  Co-teaching and GAF.
- ``uniform`` may redraw the true class, so that a nominal 50% is a real 45% with 10 classes.
  Zhang et al. (2017), DivideMix, Meta-Weight-Net, Learning to Reweight.

Nothing here is ever given the test split: these functions take and return training labels.
"""

import pathlib
import zipfile
from typing import Literal, get_args

import numpy as np

Kind = Literal["none", "symmetric", "uniform", "pair_flip"]
"""The kinds of noise that `corrupt` makes from a rate and a seed."""


KINDS: tuple[str, ...] = get_args(Kind)


def corrupt(kind: str, labels: np.ndarray, rate: float, num_classes: int, seed: int) -> np.ndarray:
    """Makes the noise of the given kind; "none" returns the labels as they are.

    Raises:
        ValueError: if `kind` is unknown (lists the known ones), or as the functions below do.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown label noise {kind!r}; known: {', '.join(KINDS)}")
    if kind == "none":
        return _checked(labels, num_classes).copy()
    return {"symmetric": symmetric, "uniform": uniform, "pair_flip": pair_flip}[kind](
        labels, rate, num_classes, seed
    )


def symmetric(labels: np.ndarray, rate: float, num_classes: int, seed: int) -> np.ndarray:
    """Flips exactly ``floor(rate · n_c)`` labels of each class c, uniformly to another class.

    Args:
        labels: ``int [n]``, true labels in 0..num_classes-1.
        rate: π in [0, 1].
        num_classes: At least 2.
        seed: A non-negative integer.

    Returns:
        The given labels, ``int32 [n]``.

    Raises:
        ValueError: if the rate is outside [0, 1] or the labels are not class numbers.
    """
    labels, flipped, rng = _chosen(labels, rate, num_classes, seed)
    labels[flipped] += rng.integers(1, num_classes, len(flipped), dtype=np.int32)
    return labels % num_classes


def uniform(labels: np.ndarray, rate: float, num_classes: int, seed: int) -> np.ndarray:
    """Redraws exactly ``floor(rate · n_c)`` labels of each class c from all classes.

    The true class may come again: the share of wrong labels is about rate · (1 - 1/num_classes).
    Arguments, result and errors are those of `symmetric`.
    """
    labels, redrawn, rng = _chosen(labels, rate, num_classes, seed)
    labels[redrawn] = rng.integers(0, num_classes, len(redrawn), dtype=np.int32)
    return labels


def pair_flip(labels: np.ndarray, rate: float, num_classes: int, seed: int) -> np.ndarray:
    """Flips exactly ``floor(rate · n_c)`` labels of each class c to c + 1, the last to 0.

    Arguments, result and errors are those of `symmetric`.
    """
    labels, flipped, _ = _chosen(labels, rate, num_classes, seed)
    labels[flipped] += 1
    return labels % num_classes


def model_made(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Takes a network's predictions on the training images as the given labels.

    The paper's ImageNet protocol (section 5.3): a trained AlexNet predicts with "dropout active",
    which "results in approximately 44% label noise".

    Args:
        labels: ``int [n]``, the true labels.
        predicted: ``int [n]``, the predicted class of each example, in the same order.
        num_classes: The number of classes.

    Raises:
        ValueError: if the two do not match, or predictions are not class numbers.
    """
    return _matching(_checked(predicted, num_classes, "predicted labels"), labels)


def from_file(path: str | pathlib.Path, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Reads given labels from a file as written by `save`; `true` may be missing in it.

    Args:
        path: The ``.npz`` file.
        labels: ``int [n]``, the true labels of the training split that the noise is for.
        num_classes: The number of classes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds no `given` labels, or is for other data.
    """
    arrays = _read(path)
    if "given" not in arrays:
        raise ValueError(f"{path} holds {sorted(arrays)}, not the array `given` of labels [n]")
    true = arrays.get("true", labels)
    if not np.array_equal(true, labels):
        raise ValueError(
            f"{path} is for other data: its true labels differ from the training set's"
        )
    return _matching(_checked(arrays["given"], num_classes, f"the given labels of {path}"), labels)


def save(path: str | pathlib.Path, given: np.ndarray, true: np.ndarray) -> None:
    """Writes ``noise.npz``, all or nothing: the arrays `given` and `true`, ``int32 [n]`` each."""
    given, true = np.asarray(given, np.int32), np.asarray(true, np.int32)
    unfinished = pathlib.Path(f"{path}.tmp")
    with open(unfinished, "wb") as file:  # a path given to np.savez gains a suffix
        np.savez_compressed(file, given=_matching(given, true), true=true)
    unfinished.replace(path)


def load(path: str | pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads ``(given, true)`` back from a file written by `save`."""
    arrays = _read(path)
    if not {"given", "true"} <= set(arrays):
        raise ValueError(f"{path} holds {sorted(arrays)}, not `given` and `true`")
    return arrays["given"], arrays["true"]


def random_pixels(images: np.ndarray, indices: np.ndarray, seed: int) -> np.ndarray:
    """Permutes the pixels of each image differently, always the same for one image and seed.

    "Images undergoing fixed random permutations of the pixels" (section 5.2). A pixel moves with
    its colour: what stays learnable are "simple statistics of pixel colors".

    Args:
        images: ``[n, h, w, c]``.
        indices: ``int [n]``, the number of each image in its split, which fixes its permutation.
        seed: A non-negative integer.

    Returns:
        New images of the same shape and dtype.
    """
    images, indices = np.asarray(images), np.asarray(indices)
    if indices.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images, but indices of shape {list(indices.shape)}")
    pixels = images.reshape(len(images), -1, images.shape[-1])
    permuted = np.empty_like(pixels)
    for i, index in enumerate(indices):
        permuted[i] = pixels[
            i, np.random.default_rng([seed, int(index)]).permutation(len(pixels[i]))
        ]
    return permuted.reshape(images.shape)


def shuffled_pixels(images: np.ndarray, seed: int) -> np.ndarray:
    """Permutes the pixels of all images ``[n, h, w, c]`` alike (Zhang et al., 2017)."""
    images = np.asarray(images)
    pixels = images.reshape(len(images), -1, images.shape[-1])
    order = np.random.default_rng(seed).permutation(pixels.shape[1])
    return pixels[:, order].reshape(images.shape)


def _chosen(
    labels: np.ndarray, rate: float, num_classes: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """A copy of the labels, and which floor(rate · n_c) of each class are to change."""
    if not 0 <= rate <= 1:
        raise ValueError(f"the noise rate must lie in [0, 1], got {rate}")
    if num_classes < 2:
        raise ValueError(f"label noise needs at least 2 classes, got {num_classes}")
    labels = _checked(labels, num_classes).copy()
    rng = np.random.default_rng(seed)
    chosen = []
    for c in range(num_classes):
        of_class = np.flatnonzero(labels == c)
        count = int(rate * len(of_class) + 1e-6)  # 0.29 * 100 is 28.999999999999996
        chosen.append(rng.choice(of_class, count, replace=False))
    return labels, np.concatenate(chosen), rng


def _checked(labels: np.ndarray, num_classes: int, what: str = "labels") -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        hint = ": label noise is for one label per example" if labels.ndim == 2 else ""
        raise ValueError(
            f"{what} must be a vector of integers, got {labels.dtype} {list(labels.shape)}{hint}"
        )
    if labels.size and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(
            f"{what} must lie in 0..{num_classes - 1}, got {labels.min()}..{labels.max()}"
        )
    return labels.astype(np.int32)


def _matching(given: np.ndarray, labels: np.ndarray) -> np.ndarray:
    if len(given) != len(labels):
        raise ValueError(f"{len(given)} given labels for {len(labels)} training examples")
    return given


def _read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return dict(file)
    except (ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a file of NumPy arrays (.npz)") from error
