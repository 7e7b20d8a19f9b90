"""A learnt noise channel behind the softmax (Goldberger and Ben-Reuven, 2017).

"Training deep neural-networks using a noise adaptation layer", the simple version, where the noise
depends on the true class alone. With p(y = i | x) the network's softmax, the given label z has::

    p(z = j | x) = Σ_i θ(i, j) p(y = i | x),    θ(i, j) = exp(b_ij) / Σ_l exp(b_il)

and the b_ij are trained with the network, on -log p(z | x). They start at::

    b_ij = log(1 - ε) where i = j, and log(ε / (K - 1)) elsewhere

with ε = `channel_noise`, as in the authors' released code where there is no network trained before,
from whose confusion matrix they start otherwise. Evaluation is by p(y | x).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import models
from train.methods import sgd
from train.methods.types import Method, Task


class NoiseLayer(models.Network):
    """A network whose logits are, in training mode, log p(z | x) of the given labels.

    Attributes:
        network: the network whose softmax is p(y | x).
        channel: b, float32 [classes, classes].
        deterministic: whether the channel is left out, as in evaluation.
    """

    def __init__(self, network: models.Network, epsilon: float):
        """Wraps `network`; `epsilon` is the share of noise that the channel starts from."""
        k = network.num_classes
        self.num_classes, self.input_shape = k, network.input_shape
        self.network = network
        other = epsilon / (k - 1)
        self.channel = nnx.Param(jnp.log(other + (1 - epsilon - other) * jnp.eye(k)))
        self.deterministic = False

    @property
    def dropout(self) -> nnx.Dropout:
        """The network's."""
        return self.network.dropout

    def logits(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """The log p(z | x), or in evaluation mode the network's logits."""
        logits = self.network(x, rngs=rngs)
        if self.deterministic:
            return logits
        theta = jax.nn.log_softmax(self.channel[...], axis=1)
        return jax.nn.logsumexp(jax.nn.log_softmax(logits)[:, :, None] + theta, axis=1)


def make(config: Any, task: Task) -> Method:
    """Takes `channel_noise` from the config."""
    del task
    return Method(
        sgd.gradient,
        f"a noise channel that starts from {config.channel_noise:g}, {sgd.HOW}",
        network=functools.partial(NoiseLayer, epsilon=config.channel_noise),
    )
