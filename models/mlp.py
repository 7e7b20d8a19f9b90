"""Multilayer perceptrons."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.network import Network


class MLP(Network):
    """Fully connected layers with ReLU between them.

    With `hidden=(512,)` and `(512, 512, 512)` these are the MLP 1×512 and 3×512 of Zhang et al.,
    "Understanding deep learning requires rethinking generalization" (2017), appendix A.

    Initial weights are normal with variance 2/(fan in + fan out), as in the authors' released
    code; biases, which that code leaves out and the published parameter counts include, are 0.

    Args:
        num_classes: length of the logits.
        input_shape: shape of one example, of any rank; it is flattened.
        hidden: widths of the hidden layers, in order; empty for a linear classifier.
        rngs: source of the initial weights (stream `params`).
        dtype: compute dtype; parameters are float32.
        dropout_rate: dropout after every hidden layer; Zhang's have none.

    Raises:
        ValueError: on a width, class count, shape or rate that makes no network.
    """

    takes = "(n,), (height, width, channels) or any other rank, sizes at least 1"

    def __init__(
        self,
        num_classes: int,
        input_shape: Sequence[int],
        *,
        rngs: nnx.Rngs,
        hidden: Sequence[int] = (512, 512),
        dtype: DTypeLike = jnp.float32,
        dropout_rate: float = 0.0,
    ):
        super().__init__(num_classes, input_shape, dropout_rate)
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden widths must be at least 1, got {tuple(hidden)}")
        widths = (math.prod(self.input_shape), *hidden, num_classes)
        *layers, self.head = (
            nnx.Linear(
                fan_in,
                fan_out,
                kernel_init=nnx.initializers.variance_scaling(1.0, "fan_avg", "normal"),
                dtype=jnp.dtype(dtype),
                rngs=rngs,
            )
            for fan_in, fan_out in itertools.pairwise(widths)
        )
        self.hidden = nnx.List(layers)

    @classmethod
    def accepts(cls, input_shape: tuple[int, ...]) -> bool:
        """Takes any shape: the input is flattened."""
        return True

    def logits(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """Flattens, then linear and ReLU for each hidden layer, then linear."""
        x = x.reshape(x.shape[0], -1)
        for layer in self.hidden:
            x = self.dropout(nnx.relu(layer(x)), rngs=rngs)
        return self.head(x)
