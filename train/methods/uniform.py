"""The uniform control: weights 1/(k-1) on the same mini-batches that the bilevel rule weighs.

It leaves out the validation mini-batch and normalises each mini-batch by its own batch
statistics, so that it differs from the bilevel rule in the weights alone.
"""

from typing import Any

import jax
import jax.numpy as jnp

from train.methods.types import Batch, Gradient, LossFn, Method, PyTree, Task


def make(config: Any, task: Task) -> Method:
    """Takes `num_validation` from the config."""
    del task
    num_validation = config.num_validation

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: PyTree) -> Gradient:
        k = batches.images.shape[0]
        training = jnp.arange(k) >= num_validation
        weights = training / jnp.sum(training)

        # The gradient of the weighted loss: no gradient per mini-batch is ever formed.
        def weighted_loss(params: PyTree) -> tuple[jax.Array, Any]:
            losses, aux = jax.vmap(loss_fn, in_axes=(None, 0))(params, batches)
            return jnp.sum(jnp.where(training, weights * losses, 0)), (losses, aux)

        (_, (losses, aux)), grads = jax.value_and_grad(weighted_loss, has_aux=True)(params)
        return Gradient(losses, aux, grads, weights, state)

    share = f"1/{config.k - num_validation}"
    return Method(gradient, f"weights {share}, as the gradient of the mean training loss")
