"""AlexNet with its two groups."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.layers import local_response_normalization
from models.network import Network


class AlexNet(Network):
    """AlexNet for 227×227 images, laid out as Caffe's `bvlc_alexnet`.

    Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks" (2012):
    conv11×11/4 96, normalisation, pool 3×3/2; conv5×5 256 in two groups, normalisation, pool;
    conv3×3 384; 384 in two groups; 256 in two groups; pool; 4096, 4096, linear; ReLU after every
    layer but the last. The grids are 55, 27, 13 and 6. For Pascal VOC it is the same network with
    20 classes, its logits going into a sigmoid each.

    Constants, from Caffe's definition: local response normalisation over 5 channels with
    α = 1e-4/5 on the sum of squares, β = 0.75, bias 1; dropout 0.5 after each layer of 4096;
    initial weights normal with standard deviation 0.01, and 0.005 for the layers of 4096; initial
    biases 0.1 for the second, fourth and fifth convolution and the layers of 4096, otherwise 0.

    Args:
        num_classes: length of the logits; 1000 for ImageNet, 20 for Pascal VOC.
        input_shape: (227, 227, channels).
        rngs: source of the initial weights (stream `params`).
        dtype: compute dtype; parameters are float32.
        dropout_rate: probability of dropping a unit of either layer of 4096.

    Raises:
        ValueError: on a class count, shape or rate that makes no network.
    """

    takes = "(227, 227, channels)"

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

        def conv(
            features_in: int,
            features: int,
            kernel: int,
            *,
            bias: float,
            stride: int = 1,
            padding: int = 0,
            groups: int = 1,
        ) -> nnx.Conv:
            return nnx.Conv(
                features_in,
                features,
                (kernel, kernel),
                strides=stride,
                padding=padding,
                feature_group_count=groups,
                kernel_init=nnx.initializers.normal(0.01),
                bias_init=nnx.initializers.constant(bias),
                dtype=dtype,
                rngs=rngs,
            )

        def dense(features_in: int, features: int, stddev: float, bias: float) -> nnx.Linear:
            return nnx.Linear(
                features_in,
                features,
                kernel_init=nnx.initializers.normal(stddev),
                bias_init=nnx.initializers.constant(bias),
                dtype=dtype,
                rngs=rngs,
            )

        self.conv1 = conv(self.input_shape[-1], 96, 11, stride=4, bias=0.0)
        self.conv2 = conv(96, 256, 5, padding=2, groups=2, bias=0.1)
        self.conv3 = conv(256, 384, 3, padding=1, bias=0.0)
        self.conv4 = conv(384, 384, 3, padding=1, groups=2, bias=0.1)
        self.conv5 = conv(384, 256, 3, padding=1, groups=2, bias=0.1)
        self.fc6 = dense(6 * 6 * 256, 4096, 0.005, 0.1)
        self.fc7 = dense(4096, 4096, 0.005, 0.1)
        self.head = dense(4096, num_classes, 0.01, 0.0)

    @classmethod
    def accepts(cls, input_shape: tuple[int, ...]) -> bool:
        """The size at which Caffe's pooling and everyone else's agree: every pool fits exactly."""
        return len(input_shape) == 3 and input_shape[:2] == (227, 227)

    def logits(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """Convolutions, flatten, fully connected layers."""
        x = _pool(_normalize(nnx.relu(self.conv1(x))))
        x = _pool(_normalize(nnx.relu(self.conv2(x))))
        x = nnx.relu(self.conv3(x))
        x = nnx.relu(self.conv4(x))
        x = _pool(nnx.relu(self.conv5(x)))
        x = x.reshape(x.shape[0], -1)
        x = self.dropout(nnx.relu(self.fc6(x)), rngs=rngs)
        x = self.dropout(nnx.relu(self.fc7(x)), rngs=rngs)
        return self.head(x)


def _pool(x: jax.Array) -> jax.Array:
    return nnx.max_pool(x, (3, 3), strides=(2, 2), padding="VALID")


def _normalize(x: jax.Array) -> jax.Array:
    return local_response_normalization(x, radius=2, bias=1.0, alpha=1e-4 / 5, beta=0.75)
