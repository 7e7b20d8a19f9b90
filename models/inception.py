"""The small Inception network for CIFAR."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.network import Network

# Fan-in scaling with factor 2 on a truncated normal, corrected for the truncation: what TF-slim's
# variance_scaling_initializer does by default.
_INIT = nnx.initializers.he_normal()


class _ConvUnit(nnx.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self,
        features_in: int,
        features: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: str = "SAME",
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(
            features_in,
            features,
            (kernel, kernel),
            strides=stride,
            padding=padding,
            use_bias=False,
            kernel_init=_INIT,
            dtype=dtype,
            rngs=rngs,
        )
        self.bn = nnx.BatchNorm(
            features, momentum=0.975, epsilon=1e-3, use_scale=False, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.bn(self.conv(x)))


class _Inception(nnx.Module):
    """A 1×1 and a 3×3 convolution unit side by side, concatenated."""

    def __init__(self, features_in: int, ones: int, threes: int, **kwargs):
        self.ones = _ConvUnit(features_in, ones, 1, **kwargs)
        self.threes = _ConvUnit(features_in, threes, 3, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([self.ones(x), self.threes(x)], axis=-1)


class _Downsample(nnx.Module):
    """A 3×3/2 convolution unit beside a 3×3/2 max pool, concatenated."""

    def __init__(self, features_in: int, features: int, **kwargs):
        self.threes = _ConvUnit(features_in, features, 3, stride=2, **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        pooled = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        return jnp.concatenate([self.threes(x), pooled], axis=-1)


class SmallInception(Network):
    """The small Inception of Zhang et al. (2017), figure 3, as in the paper's released code.

    conv3×3 96; Inc(32,32); Inc(32,48); Down(80); Inc(112,48); Inc(96,64); Inc(80,80); Inc(48,96);
    Down(96); Inc(176,160) twice; mean over the 7×7 grid; dropout; linear. Inc(a,b) concatenates a
    1×1 convolution to a channels and a 3×3 one to b; Down(c) a 3×3/2 convolution to c and a
    3×3/2 max pool.

    29×29 images (the released code) meet a VALID first convolution, 28×28 ones (Zhang et al.) a
    SAME one; from there the grids are 27 or 28, then 14, then 7.

    Constants, from the released code: convolutions without bias, batch norm with decay 0.975,
    ε = 1e-3 and a shift but no scale; dropout 0.5; initial weights, the last layer's included,
    truncated normal with variance 2/fan in.

    Args:
        num_classes: length of the logits.
        input_shape: (28, 28, channels) or (29, 29, channels).
        rngs: source of the initial weights (stream `params`).
        dtype: compute dtype; parameters and batch statistics are float32.
        dropout_rate: probability of dropping a unit.

    Raises:
        ValueError: on a class count, shape or rate that makes no network.
    """

    takes = "(28, 28, channels) or (29, 29, channels)"

    def __init__(
        self,
        num_classes: int,
        input_shape: Sequence[int],
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        dropout_rate: float = 0.5,
    ):
        super().__init__(num_classes, input_shape, dropout_rate)
        dtype = jnp.dtype(dtype)
        padding = "VALID" if self.input_shape[0] == 29 else "SAME"
        self.stem = _ConvUnit(self.input_shape[-1], 96, 3, padding=padding, dtype=dtype, rngs=rngs)
        blocks, features = [], 96
        for ones, threes in (
            *((32, 32), (32, 48), (None, 80)),
            *((112, 48), (96, 64), (80, 80), (48, 96), (None, 96)),
            *((176, 160), (176, 160)),
        ):
            if ones is None:
                blocks.append(_Downsample(features, threes, dtype=dtype, rngs=rngs))
                features += threes
            else:
                blocks.append(_Inception(features, ones, threes, dtype=dtype, rngs=rngs))
                features = ones + threes
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(features, num_classes, kernel_init=_INIT, dtype=dtype, rngs=rngs)

    @classmethod
    def accepts(cls, input_shape: tuple[int, ...]) -> bool:
        """The two sizes that lead to the final 7×7 grid in print."""
        return len(input_shape) == 3 and input_shape[:2] in ((28, 28), (29, 29))

    def logits(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """Stem, blocks, mean pool, dropout, linear."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x.mean(axis=(1, 2)), rngs=rngs))
