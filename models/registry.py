"""Networks by name."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.alexnet import AlexNet
from models.cifarnet import CifarNet
from models.inception import SmallInception
from models.mlp import MLP
from models.network import Network
from models.parameters import parameter_count
from models.preact_resnet import PreActResNet18
from models.resnet50 import ResNet50
from models.resnet_small import ResNetSmall

_NETWORKS: dict[str, Callable[..., Network]] = {
    "alexnet": AlexNet,
    "cifarnet": partial(CifarNet, variant="zhang"),
    "cifarnet_slim": partial(CifarNet, variant="slim"),
    "inception": SmallInception,
    "mlp": MLP,
    "mlp_1x512": partial(MLP, hidden=(512,)),
    "mlp_3x512": partial(MLP, hidden=(512, 512, 512)),
    "preact_resnet18": PreActResNet18,
    "resnet50": ResNet50,
    "resnet_small": partial(ResNetSmall, norm="batch"),
    "resnet_small_gn": partial(ResNetSmall, norm="group"),
}

# Input shapes and class counts that the paper and this project train with.
_USES: tuple[tuple[str, tuple[int, ...], int], ...] = (
    ("cifarnet", (28, 28, 1), 10),
    ("cifarnet", (28, 28, 3), 10),
    ("cifarnet", (28, 28, 3), 100),
    ("cifarnet_slim", (28, 28, 3), 10),
    ("cifarnet_slim", (29, 29, 3), 10),
    ("cifarnet_slim", (32, 32, 3), 10),
    ("inception", (28, 28, 3), 10),
    ("inception", (29, 29, 3), 10),
    ("inception", (29, 29, 3), 100),
    ("preact_resnet18", (32, 32, 3), 10),
    ("preact_resnet18", (32, 32, 3), 100),
    ("alexnet", (227, 227, 3), 20),
    ("alexnet", (227, 227, 3), 1000),
    ("resnet50", (224, 224, 3), 14),
    ("resnet50", (224, 224, 3), 1000),
    ("resnet_small", (8, 8, 1), 10),
    ("resnet_small", (28, 28, 1), 10),
    ("resnet_small", (64, 64, 3), 10),
    ("resnet_small_gn", (64, 64, 3), 10),
    ("mlp", (8, 8, 1), 10),
    ("mlp", (28, 28, 1), 10),
    ("mlp_1x512", (28, 28, 3), 10),
    ("mlp_3x512", (28, 28, 3), 10),
)


class Row(NamedTuple):
    """One line of `table`: a network at an input shape and class count it is used with."""

    name: str
    input_shape: tuple[int, ...]
    num_classes: int
    parameters: int


def names() -> list[str]:
    """The names that `create` knows, sorted."""
    return sorted(_NETWORKS)


def create(
    name: str,
    *,
    num_classes: int,
    input_shape: Sequence[int],
    rngs: nnx.Rngs,
    dtype: DTypeLike = jnp.float32,
    dropout_rate: float | None = None,
    **options: Any,
) -> Network:
    """Builds a network, with fresh weights and in training mode.

    Args:
        name: one of `names()`.
        num_classes: length of the logits.
        input_shape: shape of one image, (height, width, channels).
        rngs: source of the initial weights (stream `params`).
        dtype: compute dtype, such as `jnp.bfloat16`; parameters are float32 whatever it is.
        dropout_rate: probability of dropping a unit; None for the network's own default.
        **options: further arguments of the network's class, such as `hidden` of `MLP`.

    Raises:
        ValueError: if the name is unknown (the message lists the known ones), or if the network
            cannot take the input shape (the message says which it takes), the class count or the
            dropout rate.
    """
    if name not in _NETWORKS:
        raise ValueError(f"unknown network {name!r}; the networks are {', '.join(names())}")
    if dropout_rate is not None:
        options["dropout_rate"] = dropout_rate
    return _NETWORKS[name](num_classes, input_shape, rngs=rngs, dtype=dtype, **options)


def table() -> list[Row]:
    """Every network at the input shapes and class counts it is used with, parameters counted.

    Nothing is computed or stored: the networks are built abstractly.
    """
    rows = []
    for name, input_shape, num_classes in _USES:

        def build(name=name, input_shape=input_shape, num_classes=num_classes) -> Network:
            return create(name, num_classes=num_classes, input_shape=input_shape, rngs=nnx.Rngs(0))

        params = nnx.state(nnx.eval_shape(build), nnx.Param)
        rows.append(Row(name, input_shape, num_classes, parameter_count(params)))
    return rows
