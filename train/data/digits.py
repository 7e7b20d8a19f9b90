"""Handwritten digits that come with scikit-learn: 1,797 real images, nothing to download."""

import numpy as np

from train.data.types import Dataset, Split

_NUM_TRAIN = 1200


def load() -> Dataset:
    """Loads the 8x8 digits, pixel values 0..16, as 1,200 training and 597 test images.

    There is no published split. This one is the first 1,200 and the other 597 of the permutation
    ``np.random.default_rng(0).permutation(1797)`` of scikit-learn's order, and is the same in
    every run, whatever the run's seed.
    """
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    images = np.asarray(pixels).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = np.asarray(target).astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:_NUM_TRAIN], order[_NUM_TRAIN:]
    return Dataset(
        name="digits",
        train=Split(images[train], labels[train]),
        test=Split(images[test], labels[test]),
        num_classes=10,
        class_names=tuple("0123456789"),
        image_shape=(8, 8, 1),
        max_value=16,
    )
