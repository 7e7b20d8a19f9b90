"""Which examples make up the k mini-batches of each step.

Every sampler yields ``int32 [k, b]`` arrays of example indices, one row per mini-batch (the first
rows are the validation mini-batches of the bilevel rule), as a pure function of
``(seed, epoch, step)``: a resumed run needs no sampler state, and every process of a multi-host
run computes the same array and takes its own part of it (`train.mesh.Layout.part`).

All of them draw k-tuples of examples and put b tuples into a step, the j-th member of each tuple
going to mini-batch j. Tuples whose members share a label make mini-batches of identical label
multiset, which section 5.1 of the paper finds essential ("identically distributed labels in the
compared mini-batches"). The labels meant are those the network is trained on, noise included.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np

_Draw = Callable[[np.random.Generator], np.ndarray]
_Order = Callable[[int], np.ndarray]

# Epochs are drawn together up to so many indices: one at a time, between steps that have the
# processor's caches for themselves, a small one takes three times as long.
_TOGETHER = 1 << 14


class Sampler:
    """The index arrays of a run; made by the functions of this module.

    Attributes:
        k: Mini-batches per step, validation included.
        b: Examples per mini-batch.
        steps_per_epoch: Steps in each epoch, the same for all.
        seed: The seed that, with the epoch, determines the order.
    """

    def __init__(self, order: _Order, num_tuples: int, k: int, b: int, seed: int):
        """Takes `order`, which maps the number of an epoch to it, int32 [steps, k, b]."""
        self.k, self.b, self.seed = k, b, seed
        self.steps_per_epoch = num_tuples // b
        self._order = order
        self._together = max(_TOGETHER // (self.steps_per_epoch * k * b), 1)
        self._cached: tuple[int, list[np.ndarray]] | None = None

    def epoch(self, epoch: int) -> np.ndarray:
        """Returns the whole epoch, read-only: ``int32 [steps_per_epoch, k, b]``.

        The tuples that fill no complete step are left out; they are others in each epoch.
        """
        part, place = divmod(epoch, self._together)
        cached = self._cached
        if cached is None or cached[0] != part:
            if epoch < 0:
                raise ValueError(f"epoch must not be negative, got {epoch}")
            first = part * self._together
            together = [self._order(e) for e in range(first, first + self._together)]
            for indices in together:
                indices.flags.writeable = False
            cached = self._cached = (part, together)
        return cached[1][place]

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """Returns the indices of one step, ``int32 [k, b]``.

        Args:
            epoch: The epoch, from 0.
            step: The step within the epoch, from 0.

        Raises:
            IndexError: if `step` is not below `steps_per_epoch`.
        """
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} is not in 0..{self.steps_per_epoch - 1} of an epoch")
        return self.epoch(epoch)[step]

    def __getstate__(self) -> dict:
        # Data workers recompute the epoch they need; sending it to them would cost more.
        return {**self.__dict__, "_cached": None}


def stratified(
    labels: np.ndarray, k: int, b: int, *, seed: int, class_names: Sequence[str] | None = None
) -> Sampler:
    """The k mini-batches of a step have the same labels, position by position.

    The epochs of `optax_bilevel.stratified_batches`.

    Args:
        labels: ``int [n]``, the labels that the network is trained on.
        k: Mini-batches per step, at least 2.
        b: Examples per mini-batch.
        seed: A non-negative integer.
        class_names: Names for the warning below; by default the label numbers.

    Warns:
        UserWarning: names the classes with fewer than k examples, from which no tuple can be
            made: their examples are never visited.

    Raises:
        ValueError: if `labels` is not a vector of integers, ``k < 2``, ``b < 1``, or there are
            fewer than b tuples.
    """
    _at_least("k", k, 2, "; plain SGD, with one mini-batch per step, takes `random`")
    classes = _Classes(labels, class_names)
    counts = classes.counts // k
    classes.warn_if_unvisited(counts == 0, f"has fewer than k={k} examples")
    num_tuples = _enough(int(counts.sum()), k, b)

    import optax_bilevel  # here: processes that only read images need no jax

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the classes without names
        epochs = optax_bilevel.stratified_batches(labels, k, b, seed=seed)
    return Sampler(epochs.__getitem__, num_tuples, k, b, seed)


def random(num_examples: int, k: int, b: int, *, seed: int) -> Sampler:
    """Plain random mini-batches without replacement, whatever the labels (ablation c).

    Args:
        num_examples: n; the indices drawn are 0..n-1, each at most once an epoch.
        k: Mini-batches per step; 1 gives those of plain SGD.
        b: Examples per mini-batch.
        seed: A non-negative integer.

    Raises:
        ValueError: if ``k < 1``, ``b < 1``, or n is below k·b.
    """
    _at_least("k", k, 1)
    num_tuples = _enough(num_examples // k, k, b)

    def draw(rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(num_examples)[: num_tuples * k].reshape(-1, k)

    return Sampler(_drawn(draw, k, b, seed), num_tuples, k, b, seed)


def separate_validation(
    labels: np.ndarray,
    k: int,
    b: int,
    validation: np.ndarray,
    *,
    seed: int,
    num_validation: int = 1,
    class_names: Sequence[str] | None = None,
) -> Sampler:
    """Validation mini-batches always come from given examples, training ones never do.

    The label multisets of the k mini-batches are identical, as with `stratified`. A training
    example is visited at most once an epoch. The validation examples of a class serve as often as
    its training tuples ask for: each of them once before any of them twice, in an order that is
    shuffled at every pass.

    For a clean validation set, `labels` holds the clean labels at `validation` and the given
    (noisy) ones elsewhere. Where it is a data set of its own, append it to the training split
    (`train.data.concatenate`) and pass the indices of the appended part.

    Args:
        labels: ``int [n]`` for all examples, training and validation.
        k: Mini-batches per step, more than `num_validation`.
        b: Examples per mini-batch.
        validation: ``int [m]``, the indices of the validation examples, each once.
        seed: A non-negative integer.
        num_validation: How many of the k mini-batches, the first ones, are validation.
        class_names: Names for the warning below; by default the label numbers.

    Warns:
        UserWarning: names the classes whose training examples are never visited, because they
            are too few for a tuple or because no validation example has the class.

    Raises:
        ValueError: as `stratified`, or if `validation` is empty, has duplicates or indices
            outside 0..n-1.
    """
    _at_least("num_validation", num_validation, 1)
    _at_least("k", k, num_validation + 1)
    classes = _Classes(labels, class_names)
    validation = np.asarray(validation)
    if validation.ndim != 1 or not validation.size or validation.dtype.kind not in "iu":
        raise ValueError(
            "validation must be a non-empty vector of integer indices, got "
            f"{validation.dtype} {list(validation.shape)}"
        )
    if validation.min() < 0 or validation.max() >= len(classes.ids):
        raise ValueError(
            f"validation indices must lie in 0..{len(classes.ids) - 1}, "
            f"got {validation.min()}..{validation.max()}"
        )
    if len(np.unique(validation)) != len(validation):
        raise ValueError("validation names some examples more than once")

    is_training = np.ones(len(classes.ids), bool)
    is_training[validation] = False
    training = np.flatnonzero(is_training)
    size = k - num_validation
    num_classes = len(classes.counts)
    counts = np.bincount(classes.ids[training], minlength=num_classes) // size
    of_class = [validation[classes.ids[validation] == c] for c in range(num_classes)]
    has_validation = np.array([len(examples) > 0 for examples in of_class])
    in_training = np.bincount(classes.ids[training], minlength=num_classes) > 0
    classes.warn_if_unvisited(
        in_training & (counts == 0), f"has fewer than {size} training examples (k={k})"
    )
    classes.warn_if_unvisited(
        (counts > 0) & ~has_validation, "has no example in the validation set"
    )
    counts = np.where(has_validation, counts, 0)
    num_tuples = _enough(int(counts.sum()), k, b)
    draw_training = _class_tuples(classes.ids[training], counts, size)

    def draw(rng: np.random.Generator) -> np.ndarray:
        tuples = training[draw_training(rng)]
        served = [
            _queue(examples, count * num_validation, rng)
            for examples, count in zip(of_class, counts, strict=True)
            if count
        ]
        return np.hstack([np.concatenate(served).reshape(-1, num_validation), tuples])

    return Sampler(_drawn(draw, k, b, seed), num_tuples, k, b, seed)


def hold_out(labels: np.ndarray, ratio: float, *, seed: int) -> np.ndarray:
    """Chooses a validation set: the given fraction of each class, at least one example.

    With `separate_validation` this is the first row of the paper's figure 2, where the ratio is
    "the fraction of samples from the dataset used for validation only".

    Args:
        labels: ``int [n]``.
        ratio: The fraction, above 0 and below 1.
        seed: A non-negative integer.

    Returns:
        The indices of the chosen examples, sorted, ``int64 [m]``.

    Raises:
        ValueError: if `ratio` is not between 0 and 1.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"the validation ratio must lie between 0 and 1, got {ratio}")
    classes = _Classes(labels, None)
    counts = np.maximum(1, np.rint(ratio * classes.counts).astype(np.int64))
    rng = np.random.default_rng([seed, 0x7A11D])  # apart from the streams of the epochs
    return np.sort(_class_tuples(classes.ids, counts, 1)(rng).ravel())


def keep_back(labels: np.ndarray, share: float, *, seed: int) -> np.ndarray:
    """Chooses the examples that no step trains on: a share of each class.

    At least one example of every class that has two; of a class with one, none. With several
    labels per example a share of all, whatever their labels.

    Args:
        labels: ``int [n]``, the given labels, or multi-hot ``[n, c]``.
        share: Above 0 and below 1.
        seed: A non-negative integer.

    Returns:
        The indices of the chosen examples, sorted, ``int64 [m]``; empty where no class has two.
    """
    rng = np.random.default_rng([seed, 0x4E1D])  # apart from the streams of the epochs
    labels = np.asarray(labels)
    ids = np.zeros(len(labels), int) if labels.ndim == 2 else labels
    classes = _Classes(ids, None)
    counts = np.maximum(1, np.rint(share * classes.counts).astype(np.int64))
    counts[classes.counts < 2] = 0
    return np.sort(_class_tuples(classes.ids, counts, 1)(rng).ravel())


class Turns:
    """Examples in turn, some at a time: all of them before any comes again.

    A pure function of the seed and the number of the turn, as the samplers are.

    Attributes:
        size: How many examples a turn has.
    """

    def __init__(self, examples: np.ndarray, size: int, *, seed: int):
        """Takes ``int [m]`` examples; a turn has `size` of them, or all where they are fewer."""
        self._examples = np.asarray(examples, np.int32)
        self._seed = seed
        self.size = min(size, len(self._examples))
        self._per_round = len(self._examples) // self.size
        self._cached: tuple[int, np.ndarray] | None = None

    def __getitem__(self, turn: int) -> np.ndarray:
        """The examples of a turn, ``int32 [size]``."""
        number, place = divmod(turn, self._per_round)
        if self._cached is None or self._cached[0] != number:
            rng = np.random.default_rng([self._seed, 0x7024, number])
            self._cached = number, rng.permutation(self._examples)
        return self._cached[1][place * self.size : (place + 1) * self.size]


def multi_label(labels: np.ndarray, k: int, b: int, *, seed: int) -> Sampler:
    """Mini-batches of similar label sets, for examples with several labels each.

    Identical label multisets are out of reach where most label sets are rare. The examples are
    put in the order of their label sets (compared by the rarest class first, equal ones
    shuffled), so that a k-tuple of neighbours has nearly the same labels; the members of a tuple
    are shuffled over the k mini-batches. Fewer than k examples, and fewer than b tuples, are left
    out of an epoch, chosen afresh. `label_distance` measures what is left of the difference.

    Args:
        labels: ``[n, c]``, 1 (or true) where the example has the class.
        k: Mini-batches per step, at least 2.
        b: Examples per mini-batch.
        seed: A non-negative integer.

    Raises:
        ValueError: if `labels` is not a multi-hot matrix, ``k < 2``, ``b < 1``, or n is too small.
    """
    _at_least("k", k, 2, "; plain SGD, with one mini-batch per step, takes `random`")
    hot = np.asarray(labels)
    if hot.ndim != 2 or not np.isin(hot, (0, 1)).all():
        raise ValueError(
            f"labels must be multi-hot, 0 or 1, of shape [n, c]; got {hot.dtype} {list(hot.shape)}"
        )
    by_rarity = hot[:, np.argsort(hot.sum(0), kind="stable")].astype(bool)
    _, rank = np.unique(by_rarity, axis=0, return_inverse=True)
    rank = rank.reshape(-1)
    num_tuples = _enough(len(hot) // k, k, b)

    def draw(rng: np.random.Generator) -> np.ndarray:
        visited = rng.permutation(len(hot))[: num_tuples * k]
        order = visited[np.argsort(rank[visited], kind="stable")]
        return rng.permuted(order.reshape(-1, k), axis=1)

    return Sampler(_drawn(draw, k, b, seed), num_tuples, k, b, seed)


def label_distance(labels: np.ndarray, indices: np.ndarray) -> float:
    """How far the labels of the training mini-batches are from those of the validation one.

    The mean, over all steps and all j ≥ 1, of ``Σ_c |n_jc - n_0c| / Σ_c (n_jc + n_0c)``, where n_jc
    counts the examples of class c in mini-batch j. It is 0 exactly if the label multisets are
    identical and 1 if no class is shared; with one label per example it is the total variation
    distance of the two label distributions.

    Args:
        labels: ``int [n]``, or multi-hot ``[n, c]``.
        indices: ``int [..., k, b]``, as from `Sampler.epoch` or `Sampler.batch`.
    """
    labels = np.asarray(labels)
    if labels.ndim == 1:
        labels = np.eye(int(labels.max()) + 1, dtype=np.int32)[labels]
    counts = labels.astype(np.int32)[indices].sum(-2)
    first, others = counts[..., :1, :], counts[..., 1:, :]
    total = (others + first).sum(-1)
    return float(np.mean(np.abs(others - first).sum(-1) / np.maximum(total, 1)))


class _Classes:
    """Labels renumbered 0..c-1 by the classes that occur, with names for messages."""

    def __init__(self, labels: np.ndarray, class_names: Sequence[str] | None):
        labels = np.asarray(labels)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or not labels.size:
            hint = "; multi-hot labels take `multi_label`" if labels.ndim == 2 else ""
            raise ValueError(
                f"labels must be a non-empty vector of integers, got {labels.dtype} "
                f"{list(labels.shape)}{hint}"
            )
        values, ids, self.counts = np.unique(labels, return_inverse=True, return_counts=True)
        # NumPy sorts integers of 16 bits by radix, several times faster than wider ones.
        self.ids = ids.astype(np.uint16 if len(values) <= 1 << 16 else np.int64)
        self._names = [class_names[v] if class_names is not None else str(v) for v in values]

    def warn_if_unvisited(self, lost: np.ndarray, reason: str) -> None:
        if not lost.any():
            return
        named = [f"{self._names[c]} ({self.counts[c]} examples)" for c in np.flatnonzero(lost)[:10]]
        more = f" and {lost.sum() - 10} more" if lost.sum() > 10 else ""
        warnings.warn(
            f"never drawn: class {', '.join(named)}{more}, which {reason}; "
            "take a smaller k or random sampling to train on it",
            stacklevel=3,
        )


def _class_tuples(ids: np.ndarray, counts: np.ndarray, size: int) -> _Draw:
    """Draws ``counts[c]`` tuples of `size` distinct examples of each class c, in class order."""
    per_class = np.bincount(ids, minlength=len(counts))
    place = np.arange(len(ids)) - np.repeat(np.cumsum(per_class) - per_class, per_class)
    taken = place < np.repeat(counts * size, per_class)

    def draw(rng: np.random.Generator) -> np.ndarray:
        shuffled = rng.permutation(len(ids))
        return shuffled[np.argsort(ids[shuffled], kind="stable")][taken].reshape(-1, size)

    return draw


def _drawn(draw: _Draw, k: int, b: int, seed: int) -> _Order:
    """Epochs of the tuples that `draw` makes, ``[n, k]``, n the same for all.

    The tuples that fill no complete step are left out; they are others in each epoch.
    """

    def order(epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch])
        tuples = draw(rng)
        steps = len(tuples) // b
        chosen = tuples[rng.permutation(len(tuples))[: steps * b]]
        indices = chosen.reshape(steps, b, k).swapaxes(1, 2)
        return np.ascontiguousarray(indices, dtype=np.int32)

    return order


def _queue(examples: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """Serves `length` of the examples, each once before any twice, shuffled at every pass."""
    passes = -(-length // len(examples))
    return rng.permuted(np.tile(examples, (passes, 1)), axis=1).ravel()[:length]


def _at_least(name: str, value: int, least: int, hint: str = "") -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}{hint}")


def _enough(num_tuples: int, k: int, b: int) -> int:
    _at_least("b", b, 1)
    if num_tuples < b:
        raise ValueError(
            f"not one step: the data give {num_tuples} tuples of k={k} examples, and a step of "
            f"b={b} needs {b}; " + (f"b can be at most {num_tuples}" if num_tuples else "lower k")
        )
    return num_tuples
