"""Plain SGD: one gradient of the mean loss over all k·b examples of the step.

Batch norm normalises over all k·b examples here and over b in the methods that tell mini-batches
apart; `uniform` is the control for that.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from train.methods.types import Batch, Gradient, LossFn, Method, PyTree, Task

HOW = "one gradient over all examples of the step"


def make(config: Any, task: Task) -> Method:
    """SGD needs nothing from the config."""
    del config, task
    return Method(gradient, HOW)


def gradient(
    loss_fn: LossFn,
    params: PyTree,
    batches: Batch,
    state: PyTree = (),
    criterion: Callable[[jax.Array, Any], jax.Array] | None = None,
) -> Gradient:
    """One gradient of the loss of all examples of the step; `state` stays as it is.

    With a `criterion` the loss of each example is that; see `LossFn`.
    """
    if criterion is not None:
        loss_fn = functools.partial(loss_fn, criterion=criterion)
    images, labels = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), (batches.images, batches.labels)
    )
    whole = Batch(images, labels, batches.key[0])
    (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, whole)
    return Gradient(loss[None], jax.tree.map(lambda x: x[None], aux), grads, None, state)
