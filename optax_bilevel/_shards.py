"""Gradients in shards, one on each device: cut into pieces, exchanged, gathered again."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from optax_bilevel import _mesh, _tree
from optax_bilevel._mesh import AxisName
from optax_bilevel._tree import PyTree

# Shards are padded to a multiple of a TPU's lanes, or XLA turns the final all-gather into an
# all-reduce, which moves twice the bytes.
_ALIGNMENT = 128


def exchange(tree: PyTree, axes: AxisName, spread: int) -> PyTree:
    """This device's shard of every device's gradient, averaged over each `spread` neighbours.

    Leaves are cut into one piece per device, in one flat buffer [D, width of a shard] per dtype. A
    shard holds a piece of every leaf, so that leaves, and with them groups, lie at the same place
    in every shard. Sent in the gradients' dtypes, averaged in float32 or wider.

    Args:
        tree: leaves [*shape].
        axes: of the D devices.
        spread: how many devices in a row share a mini-batch.

    Returns:
        leaves [D/spread, width of the leaf's piece].
    """
    leaves, treedef = jax.tree.flatten(tree)
    count = jax.lax.axis_size(axes)
    shards: list[Any] = [None] * len(leaves)
    for dtype, indices in _by_dtype(leaves).items():
        pieces = [_pieces(leaves[i], count) for i in indices]
        widths = [piece.shape[-1] for piece in pieces]
        padding = jnp.zeros((count, -sum(widths) % _ALIGNMENT), dtype)
        buffer = jnp.concatenate([*pieces, padding], axis=-1)
        whole = jax.lax.all_to_all(buffer, axes, 0, 0, tiled=True)
        if spread > 1:  # the examples of a mini-batch, averaged here rather than on the way
            whole = whole.astype(_tree.accumulation_dtype(dtype))
            whole = jnp.mean(whole.reshape(-1, spread, whole.shape[1]), axis=1)
        for i, end, width in zip(indices, itertools.accumulate(widths), widths, strict=True):
            shards[i] = whole[..., end - width : end]
    return treedef.unflatten(shards)


def gather(shards: PyTree, like: PyTree, axes: AxisName) -> PyTree:
    """Whole leaves, of the shapes and dtypes of `like`, of the devices' shards, leaves [width]."""
    leaves, treedef = jax.tree.flatten(like)
    pieces = jax.tree.leaves(shards)
    results: list[Any] = [None] * len(leaves)
    for dtype, indices in _by_dtype(leaves).items():
        widths = [pieces[i].size for i in indices]
        padding = jnp.zeros((-sum(widths) % _ALIGNMENT,), dtype)
        shard = jnp.concatenate([*(pieces[i].astype(dtype) for i in indices), padding])
        full = jax.lax.all_gather(shard, axes, to=_mesh.same_everywhere(axes))
        full = full.reshape(-1, shard.size)
        for i, end, width in zip(indices, itertools.accumulate(widths), widths, strict=True):
            flat = full[:, end - width : end].reshape(-1)
            results[i] = flat[: leaves[i].size].reshape(leaves[i].shape)
    return treedef.unflatten(results)


def _by_dtype(leaves: list[Any]) -> dict[Any, list[int]]:
    return {
        dtype: [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
        for dtype in dict.fromkeys(leaf.dtype for leaf in leaves)
    }


def _pieces(leaf: jax.Array, count: int) -> jax.Array:
    """A leaf cut into `count` equal pieces, the last ones padded with zeros: [count, width]."""
    width = math.ceil(leaf.size / count)
    return jnp.pad(leaf.reshape(-1), (0, count * width - leaf.size)).reshape(count, width)
