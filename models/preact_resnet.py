"""PreActResNet-18 for CIFAR, the mixup paper's variant."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.network import Network

# Uniform within ±1/sqrt(fan in): PyTorch's default, which the original relies on.
_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


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


def _batch_norm(features: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.BatchNorm:
    # PyTorch's momentum 0.1 weighs the new value, Flax's 0.9 the old one.
    return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)


class _PreActBlock(nnx.Module):
    """BN, ReLU, conv3×3, BN, ReLU, (dropout), conv3×3, plus the shortcut.

    Where the shape changes the shortcut is a 1×1 convolution of the pre-activated input.
    """

    def __init__(
        self,
        features_in: int,
        features: int,
        stride: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.bn1 = _batch_norm(features_in, dtype, rngs)
        self.conv1 = _conv(features_in, features, 3, stride, dtype, rngs)
        self.bn2 = _batch_norm(features, dtype, rngs)
        self.conv2 = _conv(features, features, 3, 1, dtype, rngs)
        self.shortcut = (
            _conv(features_in, features, 1, stride, dtype, rngs)
            if stride != 1 or features_in != features
            else None
        )

    def __call__(self, x: jax.Array, dropout: Callable[[jax.Array], jax.Array]) -> jax.Array:
        activated = nnx.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        out = nnx.relu(self.bn2(self.conv1(activated)))
        return self.conv2(dropout(out)) + shortcut


class PreActResNet18(Network):
    """PreActResNet-18 as compared in table 3 of the paper.

    The architecture is that of Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018):
    a 3×3 convolution to 64 channels with batch norm and ReLU; pre-activation blocks (He et al.,
    "Identity Mappings in Deep Residual Networks", 2016), [2, 2, 2, 2] of 64, 128, 256 and 512
    channels, halving the grid before the second, third and fourth pair; mean over the grid, with
    no batch norm or ReLU before it; linear.

    Constants are PyTorch's defaults: batch norm with decay 0.9 and ε = 1e-5, initial weights
    uniform within ±1/sqrt(fan in), initial bias of the last layer 0 (PyTorch draws it). The
    running variance averages the biased variance, PyTorch's the unbiased one.

    Args:
        num_classes: length of the logits.
        input_shape: (height, width, channels), height and width at least 8; 32×32×3 in the paper.
        rngs: source of the initial weights (stream `params`).
        dtype: compute dtype; parameters and batch statistics are float32.
        dropout_rate: probability of dropping an activation before the second convolution of each
            block, where Zagoruyko and Komodakis, "Wide Residual Networks" (2016), put it.

    Raises:
        ValueError: on a class count, shape or rate that makes no network.
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
    ):
        super().__init__(num_classes, input_shape, dropout_rate)
        dtype = jnp.dtype(dtype)
        self.conv = _conv(self.input_shape[-1], 64, 3, 1, dtype, rngs)
        self.bn = _batch_norm(64, dtype, rngs)
        blocks, features_in = [], 64
        for features, first_stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            for stride in (first_stride, 1):
                blocks.append(_PreActBlock(features_in, features, stride, dtype, rngs))
                features_in = features
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(512, num_classes, kernel_init=_INIT, dtype=dtype, rngs=rngs)

    @classmethod
    def accepts(cls, input_shape: tuple[int, ...]) -> bool:
        """Three halvings must leave at least one pixel."""
        return len(input_shape) == 3 and min(input_shape[:2]) >= 8

    def logits(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """Stem, blocks, mean pool, linear."""
        x = nnx.relu(self.bn(self.conv(x)))
        for block in self.blocks:
            x = block(x, partial(self.dropout, rngs=rngs))
        return self.head(x.mean(axis=(1, 2)))
