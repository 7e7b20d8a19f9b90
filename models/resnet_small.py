"""A residual network that a CPU trains in minutes."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.network import Network

# A grid larger than this is halved by the first convolution, which quarters the cost.
_FULL_GRID = 32
_INIT = nnx.initializers.he_normal()


def _conv(
    features_in: int, features: int, kernel: int, stride: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Conv:
    return nnx.Conv(
        features_in,
        features,
        (kernel, kernel),
        strides=stride,
        padding=kernel // 2,
        use_bias=False,
        kernel_init=_INIT,
        dtype=dtype,
        rngs=rngs,
    )


def _norm(
    kind: str, features: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.BatchNorm | nnx.GroupNorm:
    if kind == "batch":
        return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)
    return nnx.GroupNorm(features, num_groups=8, epsilon=1e-5, dtype=dtype, rngs=rngs)


class _ConvNorm(nnx.Module):
    """A convolution and its normalisation."""

    def __init__(
        self,
        features_in: int,
        features: int,
        kernel: int,
        stride: int,
        norm: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv = _conv(features_in, features, kernel, stride, dtype, rngs)
        self.norm = _norm(norm, features, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class _BasicBlock(nnx.Module):
    """conv3×3, norm, ReLU, conv3×3, norm, plus the shortcut, ReLU.

    Where the shape changes the shortcut is a 1×1 convolution and norm.
    """

    def __init__(
        self,
        features_in: int,
        features: int,
        stride: int,
        norm: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv1 = _conv(features_in, features, 3, stride, dtype, rngs)
        self.norm1 = _norm(norm, features, dtype, rngs)
        self.conv2 = _conv(features, features, 3, 1, dtype, rngs)
        self.norm2 = _norm(norm, features, dtype, rngs)
        self.shortcut = (
            _ConvNorm(features_in, features, 1, stride, norm, dtype, rngs)
            if stride != 1 or features_in != features
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        out = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(out)) + shortcut)


class ResNetSmall(Network):
    """A residual network for a few thousand images of 8 to 96 pixels, in minutes on a CPU.

    Basic blocks as in He et al., "Deep Residual Learning for Image Recognition" (2016): a 3×3
    convolution to 16 channels with norm and ReLU; three blocks of 16, 32 and 64 channels, the
    second and third of which halve the grid; mean over the grid; linear. Where height or width
    exceeds 32 the first convolution halves the grid too.

    Batch norm has decay 0.9, group norm (Wu and He, 2018) 8 groups, either ε = 1e-5. Initial
    weights are normal with variance 2/fan in (He et al., "Delving Deep into Rectifiers", 2015).

    Args:
        num_classes: length of the logits.
        input_shape: (height, width, channels), height and width at least 8.
        rngs: source of the initial weights (stream `params`).
        dtype: compute dtype; parameters and batch statistics are float32.
        dropout_rate: probability of dropping a unit before the last layer.
        norm: "batch", or "group", which looks at each image by itself and keeps no statistics.

    Raises:
        ValueError: on a class count, shape, rate or norm that makes no network.
    """

    takes = "(height, width, channels), height and width at least 8"

    def __init__(
        self,
        num_classes: int,
        input_shape: Sequence[int],
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        dropout_rate: float = 0.0,
        norm: Literal["batch", "group"] = "batch",
    ):
        super().__init__(num_classes, input_shape, dropout_rate)
        if norm not in ("batch", "group"):
            raise ValueError(f'norm must be "batch" or "group", got {norm!r}')
        dtype = jnp.dtype(dtype)
        height, width, channels = self.input_shape
        stride = 1 if max(height, width) <= _FULL_GRID else 2
        self.conv = _conv(channels, 16, 3, stride, dtype, rngs)
        self.norm = _norm(norm, 16, dtype, rngs)
        blocks, features_in = [], 16
        for features, stride in ((16, 1), (32, 2), (64, 2)):
            blocks.append(_BasicBlock(features_in, features, stride, norm, dtype, rngs))
            features_in = features
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(features_in, num_classes, kernel_init=_INIT, dtype=dtype, rngs=rngs)

    @classmethod
    def accepts(cls, input_shape: tuple[int, ...]) -> bool:
        """Two halvings must leave a grid of at least 2×2."""
        return len(input_shape) == 3 and min(input_shape[:2]) >= 8

    def logits(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """Stem, blocks, mean pool, linear."""
        x = nnx.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x.mean(axis=(1, 2)), rngs=rngs))
