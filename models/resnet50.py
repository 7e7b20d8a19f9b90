"""ResNet-50 in torchvision's layout, and its pretrained weights."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.typing import DTypeLike

from models.network import Network


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
        kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
        dtype=dtype,
        rngs=rngs,
    )


def _batch_norm(features: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.BatchNorm:
    # PyTorch's momentum 0.1 weighs the new value, Flax's 0.9 the old one.
    return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)


class _Downsample(nnx.Module):
    """1×1 convolution and batch norm on a shortcut whose shape changes."""

    def __init__(
        self, features_in: int, features: int, stride: int, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.conv = _conv(features_in, features, 1, stride, dtype, rngs)
        self.bn = _batch_norm(features, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.bn(self.conv(x))


class _Bottleneck(nnx.Module):
    """1×1 to width, 3×3 (which carries the stride), 1×1 to 4·width, plus the shortcut."""

    def __init__(self, features_in: int, width: int, stride: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv1 = _conv(features_in, width, 1, 1, dtype, rngs)
        self.bn1 = _batch_norm(width, dtype, rngs)
        self.conv2 = _conv(width, width, 3, stride, dtype, rngs)
        self.bn2 = _batch_norm(width, dtype, rngs)
        self.conv3 = _conv(width, 4 * width, 1, 1, dtype, rngs)
        self.bn3 = _batch_norm(4 * width, dtype, rngs)
        self.downsample = (
            _Downsample(features_in, 4 * width, stride, dtype, rngs)
            if stride != 1 or features_in != 4 * width
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        out = nnx.relu(self.bn1(self.conv1(x)))
        out = nnx.relu(self.bn2(self.conv2(out)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return nnx.relu(self.bn3(self.conv3(out)) + shortcut)


class ResNet50(Network):
    """ResNet-50 v1.5 as in torchvision: the stride of a bottleneck sits on its 3×3 convolution.

    He et al., "Deep Residual Learning for Image Recognition" (2016): conv7×7/2 64, pool 3×3/2,
    bottlenecks [3, 4, 6, 3] of width 64, 128, 256 and 512, mean over the grid, linear. The paper
    trains one on Clothing1M from ImageNet weights; see `load_pretrained`.

    Constants, from torchvision: batch norm with decay 0.9 and ε = 1e-5; initial weights of
    convolutions normal with variance 2/fan out, of the last layer uniform within ±1/sqrt(fan in)
    with bias 0 (torchvision draws it). The running variance averages the biased variance,
    PyTorch's the unbiased one.

    Args:
        num_classes: length of the logits.
        input_shape: (height, width, channels), height and width at least 32; 224×224×3 in use.
        rngs: source of the initial weights (stream `params`).
        dtype: compute dtype; parameters and batch statistics are float32.
        dropout_rate: probability of dropping a unit before the last layer; torchvision has none.

    Raises:
        ValueError: on a class count, shape or rate that makes no network.
    """

    takes = "(height, width, channels), height and width at least 32"

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
        features = 64

        def stage(width: int, blocks: int, stride: int) -> nnx.List:
            nonlocal features
            bottlenecks = []
            for first in (True, *[False] * (blocks - 1)):
                bottlenecks.append(
                    _Bottleneck(features, width, stride if first else 1, dtype, rngs)
                )
                features = 4 * width
            return nnx.List(bottlenecks)

        self.conv1 = _conv(self.input_shape[-1], 64, 7, 2, dtype, rngs)
        self.bn1 = _batch_norm(64, dtype, rngs)
        self.layer1 = stage(64, 3, 1)
        self.layer2 = stage(128, 4, 2)
        self.layer3 = stage(256, 6, 2)
        self.layer4 = stage(512, 3, 2)
        self.head = nnx.Linear(
            features,
            num_classes,
            kernel_init=nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            dtype=dtype,
            rngs=rngs,
        )

    @classmethod
    def accepts(cls, input_shape: tuple[int, ...]) -> bool:
        """Five halvings must leave at least one pixel."""
        return len(input_shape) == 3 and min(input_shape[:2]) >= 32

    def logits(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """Stem, bottlenecks, mean pool, linear."""
        x = nnx.relu(self.bn1(self.conv1(x)))
        # Flax pads as asked, whatever its annotation says.
        padding: Any = ((1, 1), (1, 1))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=padding)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for bottleneck in stage:
                x = bottleneck(x)
        return self.head(self.dropout(x.mean(axis=(1, 2)), rngs=rngs))


def load_pretrained(
    model: ResNet50, path: str | os.PathLike[str], *, replace_head: bool = False
) -> None:
    """Fills the network, in place, with the weights of torchvision's or timm's ResNet-50.

    The file is a state dict saved by safetensors: timm publishes its `resnet50` so; torchvision's
    becomes one by `safetensors.torch.save_file(torchvision_model.state_dict(), path)`. Every
    tensor is accounted for, and nothing is written unless all fit; `num_batches_tracked`, which
    counts PyTorch's training steps and plays no part in the network, is skipped.

    Images must be scaled as in the original's training: RGB in [0, 1], less the mean
    (0.485, 0.456, 0.406), divided by (0.229, 0.224, 0.225).

    Args:
        model: the network to fill.
        path: the ``.safetensors`` file.
        replace_head: keep the network's own last layer, for another set of classes (14 in
            Clothing1M, where ImageNet has 1000); the file's `fc` tensors are then not used and
            may be absent.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not in safetensors format, or naming each tensor that is
            missing, unexpected, or of another shape than the network's.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {os.fspath(path)!r} with pretrained weights")
    try:
        tensors = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{os.fspath(path)!r} is not a safetensors file ({error}); convert a PyTorch state "
            "dict with safetensors.torch.save_file(state_dict, path)"
        ) from error

    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    wanted = {
        _torchvision_name(path_here): (path_here, variable)
        for path_here, variable in nnx.to_flat_state(state)
        if not (replace_head and path_here[0] == "head")
    }
    unused = {
        name.replace("running_mean", "num_batches_tracked")
        for name in wanted
        if name.endswith("running_mean")
    }
    if replace_head:
        unused |= {"fc.weight", "fc.bias"}

    problems = [f"missing: {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected: {name}" for name in sorted(tensors.keys() - wanted.keys() - unused)]
    loaded = []
    for name, (path_here, variable) in wanted.items():
        if name not in tensors:
            continue
        value = tensors[name].transpose(_FROM_TORCH.get(tensors[name].ndim))
        if value.shape != variable.shape:
            expected = np.empty(variable.shape).transpose(_TO_TORCH.get(variable.ndim)).shape
            problem = f"misshapen: {name}, expected {expected}, got {tensors[name].shape}"
            if path_here[0] == "head":
                problem += "; replace_head=True keeps the network's own last layer"
            problems.append(problem)
        loaded.append((path_here, variable.replace(jnp.asarray(value, variable.dtype))))
    if problems:
        raise ValueError(
            f"{os.fspath(path)!r} does not hold this ResNet-50:\n  " + "\n  ".join(problems)
        )
    nnx.update(model, nnx.from_flat_state(loaded))


# Axes of a kernel by its rank: PyTorch's (out, in, height, width) and (out, in) against Flax's
# (height, width, in, out) and (in, out). Vectors are the same in both.
_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0)}
_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}

_TORCH_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# `conv` and `bn`, without a number, are the two of `downsample`, a Sequential there.
_TORCH_MODULES = {"conv": "0", "bn": "1", "head": "fc"}


def _torchvision_name(path: tuple) -> str:
    """("layer1", 0, "bn1", "mean") -> "layer1.0.bn1.running_mean"."""
    *modules, leaf = path
    modules = [_TORCH_MODULES.get(module, str(module)) for module in modules]
    return ".".join([*modules, _TORCH_LEAVES[leaf]])
