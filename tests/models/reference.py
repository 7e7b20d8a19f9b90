"""Layers in float64 NumPy, written from their definitions: the tests' yardstick."""

from typing import Literal

import numpy as np

Padding = Literal["SAME", "VALID"] | int


def pad(x, kernel, stride, padding: Padding, value=0.0):
    """Pads [batch, height, width, channels]; "SAME" as TensorFlow defines it."""
    if padding == "VALID":
        padding = 0
    if padding == "SAME":
        sides = []
        for size in x.shape[1:3]:
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides.append((total // 2, total - total // 2))
    else:
        sides = [(padding, padding)] * 2
    return np.pad(x, [(0, 0), *sides, (0, 0)], constant_values=value)


def windows(x, kernel, stride):
    """[batch, height', width', kernel, kernel, channels]."""
    view = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(1, 2))
    return np.moveaxis(view[:, ::stride, ::stride], 3, -1)


def conv(x, kernel, bias=None, *, stride=1, padding: Padding = "SAME", groups=1):
    """Cross-correlation with a kernel [size, size, in / groups, out]."""
    kernel = np.asarray(kernel, np.float64)
    size, _, features_in, features = kernel.shape
    patches = windows(pad(np.asarray(x, np.float64), size, stride, padding), size, stride)
    share = features // groups
    out = np.concatenate(
        [
            np.tensordot(
                patches[..., g * features_in : (g + 1) * features_in],
                kernel[..., g * share : (g + 1) * share],
                axes=3,
            )
            for g in range(groups)
        ],
        axis=-1,
    )
    return out if bias is None else out + np.asarray(bias, np.float64)


def max_pool(x, size, stride, padding: Padding):
    return windows(pad(x, size, stride, padding, -np.inf), size, stride).max(axis=(3, 4))


def dense(x, layer):
    return x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"], np.float64)


def relu(x):
    return np.maximum(x, 0)


def lrn(x, radius, bias, alpha, beta):
    out = np.empty_like(x)
    for c in range(x.shape[-1]):
        near = x[..., max(c - radius, 0) : c + radius + 1]
        out[..., c] = x[..., c] / (bias + alpha * (near**2).sum(-1)) ** beta
    return out


def standardize(x, mean, var, scale, shift, epsilon):
    """Batch norm by given statistics; NumPy float64 throughout."""
    mean, var, scale, shift = (np.asarray(a, np.float64) for a in (mean, var, scale, shift))
    return (x - mean) / np.sqrt(var + epsilon) * scale + shift


def batch_norm(x, scale, shift, epsilon):
    """Batch norm by the batch's own (biased) statistics."""
    axes = (0, 1, 2)
    return standardize(x, x.mean(axes), x.var(axes), scale, shift, epsilon)
