"""What a step takes and returns: the whole run, and a batch."""

from typing import Any, NamedTuple

import jax

from train.evidence import Evidence
from train.sums import Sums

PyTree = Any


class Best(NamedTuple):
    """The network of the epoch with the highest accuracy on the held-out part, the first such.

    Attributes:
        step: the steps done at its end, int32 []; 0 before the first epoch has ended.
        params: the network's parameters.
        batch_stats: its running averages of batch norm.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree


class State(NamedTuple):
    """The whole run: with the config, all that decides how it goes on.

    Attributes:
        step: steps done, int32 [].
        params: the network's parameters.
        batch_stats: running averages of batch norm, empty for networks without.
        opt_state: state of the optimizer, as the method wraps it.
        method: state of the method, empty for most.
        sums: of the epoch at hand.
        evidence: about every example, those trained on first and then those held out; None with
            several labels per example.
        best: of the epochs so far; None where nothing is held out.
        failed: the first step that left a NaN or an Inf in the parameters or the running averages,
            or had no finite loss, int32 []; -1 while there is none.
    """

    step: jax.Array
    params: PyTree
    batch_stats: PyTree
    opt_state: PyTree
    method: PyTree
    sums: Sums
    evidence: Evidence | None
    best: Best | None
    failed: jax.Array


class Examples(NamedTuple):
    """Some examples.

    Attributes:
        images: uint8 [n, h, w, c].
        labels: given labels, int32 [n] or [n, classes].
    """

    images: Any
    labels: Any


class RawBatch(NamedTuple):
    """What the host hands over for a step.

    Attributes:
        images: uint8 [k, b, h, w, c].
        labels: given labels, int32 [k, b] or [k, b, classes].
        true: true labels, likewise; None where nobody knows them.
        indices: which training examples they are, int32 [k, b].
        copies: on a mesh, the first `Program.copies` mini-batches again, whole on every device.
        judges: held-out examples that judge the step, `Program.judges` of them, whole on every
            device; None where the method asks for none.
    """

    images: Any
    labels: Any
    true: Any
    indices: Any = None
    copies: Any = None
    judges: Examples | None = None


class Resident(NamedTuple):
    """The examples on the device, from which a step takes its batch itself.

    Attributes:
        images: uint8 [n, h, w, c].
        labels: given labels, int32 [n] or [n, classes].
        true: true labels, likewise; None where nobody knows them.
        indices: which examples the step takes, int32 [k, b].
        judges: which held-out ones judge it, int32 [n]; None where none do.
    """

    images: Any
    labels: Any
    true: Any
    indices: Any
    judges: Any = None

    def batch(self) -> RawBatch:
        """What the step takes."""

        def take(whole: jax.Array, indices: Any) -> jax.Array:
            return whole.at[indices].get(mode="promise_in_bounds")

        true = None if self.true is None else take(self.true, self.indices)
        judges = None
        if self.judges is not None:
            judges = Examples(take(self.images, self.judges), take(self.labels, self.judges))
        return RawBatch(
            take(self.images, self.indices), take(self.labels, self.indices), true, self.indices,
            judges=judges,
        )  # fmt: skip


class Measured(NamedTuple):
    """What an epoch's end tells the device of the held-out part.

    Attributes:
        improved: whether no epoch before was as good on it, bool [].
        labels: given labels of the held-out examples, int32 [m]; None with several labels each.
        scores: their log-probabilities, float32 [m, classes]; None likewise.
    """

    improved: Any
    labels: Any = None
    scores: Any = None
