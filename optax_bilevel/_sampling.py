"""Mini-batches with the same labels, which the paper's rule needs; in NumPy."""

import warnings
from typing import Any, Self

import numpy as np

from optax_bilevel import _validate


class _Epochs:
    """The epochs of `stratified_batches`: an iterator without end, and each of them by number."""

    def __init__(self, classes: np.ndarray, counts: np.ndarray, k: int, b: int, seed: int):
        self._classes, self._k, self._b, self._seed = classes, k, b, seed
        # Of the examples in the order of their classes: those that fill a tuple.
        place = np.arange(len(classes)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._taken = place < np.repeat(counts // k * k, counts)
        self._next = 0

    def __getitem__(self, epoch: int) -> np.ndarray:
        """The examples of an epoch, int32 [steps, k, b]; a pure function of the seed and it."""
        if epoch < 0:
            raise IndexError(f"epochs count from 0, got {epoch}")
        rng = np.random.default_rng([self._seed, epoch])
        shuffled = rng.permutation(len(self._classes))
        by_class = shuffled[np.argsort(self._classes[shuffled], kind="stable")]
        tuples = by_class[self._taken].reshape(-1, self._k)
        steps = len(tuples) // self._b
        chosen = tuples[rng.permutation(len(tuples))[: steps * self._b]]
        indices = chosen.reshape(steps, self._b, self._k).swapaxes(1, 2)
        return np.ascontiguousarray(indices, dtype=np.int32)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> np.ndarray:
        epoch = self[self._next]
        self._next += 1
        return epoch


def stratified_batches(labels: Any, k: int, b: int, *, seed: int) -> _Epochs:
    """The examples of every step: k mini-batches of b examples with the same labels.

    Each epoch shuffles every class, cuts it into k-tuples, shuffles the tuples over all classes and
    puts b of them into each step; the j-th member of each goes to mini-batch j. So the k
    mini-batches of a step have the same number of examples of every class, position by position,
    and no example comes twice in an epoch. The up to k - 1 examples of a class that fill no tuple,
    and the up to b - 1 tuples that fill no step, are others in every epoch.

    Args:
        labels: int [n], the labels that are trained on, wrong ones included.
        k: mini-batches per step, at least 2; the first is the validation mini-batch.
        b: examples per mini-batch.
        seed: a non-negative integer.

    Returns:
        An iterator over epochs, without end, each int32 [steps, k, b], numbers of examples.
        ``stratified_batches(...)[e]`` is epoch e, a pure function of the seed and e, for a run that
        goes on.

    Warns:
        UserWarning: names the classes with fewer than k examples, which are never visited.

    Raises:
        ValueError: if `labels` is not a vector of integers, ``k < 2``, ``b < 1``, ``seed < 0``, or
            there are fewer than b tuples.

    Example:
        >>> import numpy as np, optax_bilevel
        >>> labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
        >>> epochs = optax_bilevel.stratified_batches(labels, k=2, b=2, seed=0)
        >>> epoch = next(epochs)
        >>> epoch.shape
        (2, 2, 2)
        >>> bool((labels[epoch[:, 0]] == labels[epoch[:, 1]]).all())
        True
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be a vector of integers, got shape {labels.shape} of {labels.dtype}"
        )
    for name, value, least in (("k", k, 2), ("b", b, 1), ("seed", seed, 0)):
        _validate.at_least(name, value, least)
    values, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    tuples = int(np.sum(counts // k))
    small = ", ".join(map(str, values[counts < k]))
    named = f"classes with fewer than k = {k} examples: {small}"
    if tuples < b:
        raise ValueError(
            f"a step needs b = {b} groups of k = {k} examples of one class, and the {len(labels)} "
            f"labels make {tuples}{f'; {named}' if small else ''}. Take a smaller k or b"
        )
    if small:
        warnings.warn(f"{named} are never visited. Take a smaller k", stacklevel=2)
    # NumPy sorts integers of 16 bits by radix, several times faster than wider ones.
    narrow = np.uint16 if len(values) <= 1 << 16 else np.int64
    return _Epochs(classes.astype(narrow), counts, k, b, seed)
