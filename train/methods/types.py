"""The interface of a method."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

PyTree = Any


class Batch(NamedTuple):
    """One mini-batch, or k of them along a leading axis.

    Attributes:
        images: float32 [b, h, w, c], augmented.
        labels: the given labels, int32 [b], or [b, classes] of 0 and 1.
        key: the random key of the mini-batch's dropout, [].
    """

    images: jax.Array
    labels: jax.Array
    key: jax.Array


LossFn = Callable[[PyTree, Batch], tuple[jax.Array, Any]]


class Gradient(NamedTuple):
    """What a method makes of a step.

    Attributes:
        losses: of each mini-batch, [k] (SGD: [1]).
        aux: what the loss function returns beside the loss, leaves [k, ...] (SGD: [1, ...]).
        grads: the gradient to descend, like the parameters.
        weights: ω̂ [k], 0 in validation slots; None where nothing is weighed.
    """

    losses: jax.Array
    aux: Any
    grads: PyTree
    weights: jax.Array | None


Method = Callable[[LossFn, PyTree, Batch], Gradient]
