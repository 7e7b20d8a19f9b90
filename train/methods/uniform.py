"""The uniform control: weights 1/(k-1) on the same mini-batches that the bilevel rule weighs.

It leaves out the validation mini-batch and normalises each mini-batch by its own batch
statistics, so that it differs from the bilevel rule in the weights alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from train import mesh
from train.mesh import Layout
from train.methods.forms import on_each_device
from train.methods.types import Batch, Gradient, LossFn, Method, PyTree, Task


def make(config: Any, task: Task) -> Method:
    """Takes `num_validation` from the config."""
    num_validation, layout = config.num_validation, task.layout

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: PyTree) -> Gradient:
        k = batches.images.shape[0]
        training = jnp.arange(k) >= num_validation
        weights = training / jnp.sum(training)
        if layout is not None and layout.spread > 1:
            losses, aux, grads = _over_parts(layout, loss_fn, params, batches, weights)
            return Gradient(losses, aux, grads, weights, state)

        # The gradient of the weighted loss: no gradient per mini-batch is ever formed.
        def weighted_loss(params: PyTree) -> tuple[jax.Array, Any]:
            losses, aux = jax.vmap(loss_fn, in_axes=(None, 0))(params, batches)
            return jnp.sum(jnp.where(training, weights * losses, 0)), (losses, aux)

        (_, (losses, aux)), grads = jax.value_and_grad(weighted_loss, has_aux=True)(params)
        return Gradient(losses, aux, grads, weights, state)

    share = f"1/{config.k - num_validation}"
    return Method(gradient, f"weights {share}, as the gradient of the mean training loss")


def _over_parts(
    layout: Layout, loss_fn: LossFn, params: PyTree, batches: Batch, weights: jax.Array
) -> Any:
    """Losses, what comes beside them and the gradient, of a part of a mini-batch on each device.

    In one all-reduce; left to itself the compiler adds up parts first and then mini-batches.
    """

    def combine(grads: PyTree, weights: jax.Array) -> tuple[Any, ...]:
        share = weights[jax.lax.axis_index(mesh.BATCH)] / layout.spread
        own = jax.tree.map(lambda g: jnp.where(share > 0, g * share.astype(g.dtype), 0), grads)
        return (jax.lax.psum(own, mesh.ALL),)

    return on_each_device(layout, loss_fn, combine, (P(),), (P(),))(params, batches, weights)
