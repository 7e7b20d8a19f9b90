"""Plain SGD: one gradient of the mean loss over all k·b examples of the step.

Batch norm normalises over all k·b examples here and over b in the methods that tell mini-batches
apart; `uniform` is the control for that.
"""

from typing import Any

import jax

from train.methods.types import Batch, Gradient, LossFn, Method, PyTree


def make(config: Any) -> tuple[Method, str]:
    """SGD needs nothing from the config."""
    del config

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch) -> Gradient:
        images, labels, key = batches
        whole = Batch(
            images.reshape(-1, *images.shape[2:]), labels.reshape(-1, *labels.shape[2:]), key[0]
        )
        (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, whole)
        return Gradient(loss[None], jax.tree.map(lambda x: x[None], aux), grads, None)

    return gradient, "one gradient over all examples of the step"
