"""CifarNet, the small AlexNet for CIFAR, in its two published variants."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.layers import local_response_normalization
from models.network import Network


class CifarNet(Network):
    """Two 5×5 convolutions with pooling and local response normalisation, then 384, 192, linear.

    `variant="zhang"`: "small AlexNet" of Zhang et al., "Understanding deep learning requires
    rethinking generalization" (2017), appendix A, where each convolution is followed by a max pool
    3×3/2 (SAME) and then the normalisation.

    `variant="slim"`: `cifarnet` of TF-slim, which the authors of the paper probably used: the pool
    is 2×2/2 (VALID) and the second normalisation comes before its pool.

    Constants of both, from TF-slim: normalisation with radius 4, bias 1, α = 0.001/9, β = 0.75;
    dropout 0.5 after the layer of 384; initial weights truncated normal (at two standard
    deviations) with standard deviation 0.05 for convolutions, 0.04 for the layers of 384 and 192,
    1/192 for the last; initial biases 0, and 0.1 for the layers of 384 and 192. Zhang et al. state
    no initialisation.

    Args:
        num_classes: length of the logits.
        input_shape: (height, width, channels), height and width at least 4; 28×28×3 in Zhang's,
            28×28 to 32×32 in slim's.
        variant: "zhang" or "slim".
        rngs: source of the initial weights (stream `params`).
        dtype: compute dtype; parameters are float32.
        dropout_rate: probability of dropping a unit.

    Raises:
        ValueError: on an unknown variant, a class count, shape or rate that makes no network.
    """

    takes = "(height, width, channels), height and width at least 4"

    def __init__(
        self,
        num_classes: int,
        input_shape: Sequence[int],
        *,
        rngs: nnx.Rngs,
        variant: Literal["zhang", "slim"] = "zhang",
        dtype: DTypeLike = jnp.float32,
        dropout_rate: float = 0.5,
    ):
        super().__init__(num_classes, input_shape, dropout_rate)
        if variant not in ("zhang", "slim"):
            raise ValueError(f"CifarNet has the variants 'zhang' and 'slim', got {variant!r}")
        self.variant = variant
        dtype = jnp.dtype(dtype)
        height, width, channels = self.input_shape
        for _ in range(2):
            if variant == "zhang":
                height, width = -(-height // 2), -(-width // 2)
            else:
                height, width = height // 2, width // 2

        def conv(features_in: int) -> nnx.Conv:
            init = nnx.initializers.truncated_normal(0.05)
            return nnx.Conv(features_in, 64, (5, 5), kernel_init=init, dtype=dtype, rngs=rngs)

        def dense(features_in: int, features: int, stddev: float, bias: float) -> nnx.Linear:
            return nnx.Linear(
                features_in,
                features,
                kernel_init=nnx.initializers.truncated_normal(stddev),
                bias_init=nnx.initializers.constant(bias),
                dtype=dtype,
                rngs=rngs,
            )

        self.conv1 = conv(channels)
        self.conv2 = conv(64)
        self.fc3 = dense(height * width * 64, 384, 0.04, 0.1)
        self.fc4 = dense(384, 192, 0.04, 0.1)
        self.head = dense(192, num_classes, 1 / 192, 0.0)

    @classmethod
    def accepts(cls, input_shape: tuple[int, ...]) -> bool:
        """Two halvings must leave at least one pixel."""
        return len(input_shape) == 3 and min(input_shape[:2]) >= 4

    def logits(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """Convolutions, flatten, fully connected layers."""
        if self.variant == "zhang":
            x = _normalize(_pool3(nnx.relu(self.conv1(x))))
            x = _normalize(_pool3(nnx.relu(self.conv2(x))))
        else:
            x = _normalize(_pool2(nnx.relu(self.conv1(x))))
            x = _pool2(_normalize(nnx.relu(self.conv2(x))))
        x = x.reshape(x.shape[0], -1)
        x = self.dropout(nnx.relu(self.fc3(x)), rngs=rngs)
        x = nnx.relu(self.fc4(x))
        return self.head(x)


def _pool2(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (2, 2), strides=(2, 2), padding="VALID")


def _pool3(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")


def _normalize(x: jax.Array) -> jax.Array:
    return local_response_normalization(x, radius=4, bias=1.0, alpha=0.001 / 9, beta=0.75)
