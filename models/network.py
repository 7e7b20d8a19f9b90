"""What every network has in common."""

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx


class Network(nnx.Module):
    """A classifier of images.

    A new network is in training mode; `eval()` and `train()` switch batch norm and dropout.
    Parameters are `nnx.Param` in float32, running averages `nnx.BatchStat`, and there is no
    other state: the randomness of dropout comes in with each call, so that a training step
    stays a pure function of pytrees::

        graphdef, params, batch_stats = nnx.split(model, nnx.Param, ...)

        def loss_fn(params, batch_stats, batch, key):
            model = nnx.merge(graphdef, params, batch_stats, copy=True)
            logits = model(batch["image"], rngs=nnx.Rngs(key))
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return loss.mean(), nnx.state(model, nnx.BatchStat)

    Attributes:
        num_classes: length of the logits.
        input_shape: shape of one image, (height, width, channels).
        dropout: the dropout layer; its rate is 0 where the network has none by default.
    """

    takes: ClassVar[str] = "(height, width, channels)"

    def __init__(self, num_classes: int, input_shape: Sequence[int], dropout_rate: float):
        shape = tuple(input_shape)
        if not shape or any(size < 1 for size in shape) or not self.accepts(shape):
            raise ValueError(
                f"{type(self).__name__} takes images of shape {self.takes}, got input_shape={shape}"
            )
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        if not 0 <= dropout_rate < 1:
            raise ValueError(
                "dropout_rate is the probability of dropping a unit, at least 0 and below 1, "
                f"got {dropout_rate}"
            )
        self.num_classes = num_classes
        self.input_shape = shape
        self.dropout = nnx.Dropout(dropout_rate)

    @classmethod
    def accepts(cls, input_shape: tuple[int, ...]) -> bool:
        """Whether the network can take images of this shape; `takes` says the same in words."""
        return len(input_shape) == 3

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Computes the logits.

        Args:
            x: images, ``[batch, *input_shape]``, of any dtype; computed in the network's `dtype`.
            rngs: source of the dropout masks, one stream drawn from per dropout layer;
                needed only in training mode and with a dropout rate above 0.

        Returns:
            Logits, [batch, num_classes], float32.

        Raises:
            ValueError: if the images have another shape than the network was built for, or if
                dropout needs `rngs` and there are none.
        """
        if x.shape[1:] != self.input_shape:
            raise ValueError(
                f"{type(self).__name__} was built for images of shape {self.input_shape}: "
                f"expected x of shape [batch, {', '.join(map(str, self.input_shape))}], "
                f"got {list(x.shape)}"
            )
        return self.logits(x, rngs).astype(jnp.float32)

    def logits(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """The network itself: images to logits in the compute dtype."""
        raise NotImplementedError
