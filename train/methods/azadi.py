"""Azadi's group norm of auxiliary images, AIR (Azadi et al., 2016).

"Auxiliary image regularization for deep CNNs with noisy labels": the features of every auxiliary
image are a group, and the norms of what the classifier makes of each group are penalised, so that
it relies on the features of few images, the reliable ones. With x_i the features of image i (the
inputs of the last layer), w_k the last layer's weights of class k and ``|x_i|₀`` the number of
features that are not 0::

    R(W) = λ / (n K) · Σ_i Σ_k ‖x_i ∘ w_k‖₂ / √|x_i|₀

is added to the loss; λ is `group_norm`. The normalisation, training images as the auxiliary ones
and λ = 10 are as in the authors' released code, whose further terms its CIFAR-10 runs leave out.

What differs: there a linear classifier is trained on the features, scaled to norm 1, of an AlexNet
that other, clean images taught, R is over all auxiliary images at once, and stochastic ADMM solves
for W. Here the network is trained from scratch, R is over the images of the step and a constant to
all but the last layer, and SGD descends it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import models
from train.methods import sgd
from train.methods.types import Aux, Batch, Gradient, LossFn, Method, PyTree, Task, cross_entropy


class Head(nnx.Module):
    """The last layer, which records R(W) / λ of the images that it sees."""

    def __init__(self, linear: nnx.Linear):
        """Wraps the layer."""
        self.linear = linear

    def __call__(self, x: jax.Array) -> jax.Array:
        """The layer's output for features [n, d]: logits [n, K]."""
        self.group_norm = nnx.Intermediate(group_norm(x, self.linear.kernel[...]))
        return self.linear(x)


def group_norm(features: jax.Array, kernel: jax.Array) -> jax.Array:
    """R(W) / λ, float32 [], differentiable in the kernel alone.

    Args:
        features: x, [n, d].
        kernel: W, [d, K].
    """
    x = jax.lax.stop_gradient(features).astype(jnp.float32)
    squares = jnp.square(x) @ jnp.square(kernel)  # ‖x_i ∘ w_k‖², [n, K]
    norms = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    count = jnp.maximum(jnp.sum(x != 0, axis=1, keepdims=True), 1)
    return jnp.mean(norms / jnp.sqrt(count))


def make(config: Any, task: Task) -> Method:
    """Takes `group_norm` from the config."""
    del task

    def network(network: Any) -> models.Network:
        if not isinstance(getattr(network, "head", None), nnx.Linear):
            raise ValueError(
                "azadi penalises the last layer's weights: the network must have an nnx.Linear "
                f"named head, and {type(network).__name__} has none"
            )
        network.head = Head(network.head)
        return network

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: PyTree) -> Gradient:
        def regularized(
            params: PyTree,
            batch: Batch,
            criterion: Callable[[jax.Array, Any], jax.Array] = cross_entropy,
        ) -> tuple[jax.Array, Aux]:
            loss, aux = loss_fn(params, batch, criterion)
            return loss + config.group_norm * sum(jax.tree.leaves(aux.recorded)), aux

        return sgd.gradient(regularized, params, batches, state)

    how = f"group norm of the last layer times {config.group_norm:g}, {sgd.HOW}"
    return Method(gradient, how, network=network)
