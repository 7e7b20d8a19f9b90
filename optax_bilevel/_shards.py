"""Gradients in shards, one on each device: cut into pieces, exchanged, gathered again."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_bilevel import _inner_products
from optax_bilevel._inner_products import AxisName, PyTree

# Shards are padded to a multiple of a TPU's lanes, or XLA turns the final all-gather into an
# all-reduce, which moves twice the bytes.
_ALIGNMENT = 128


def to_shards(tree: PyTree, count: int, exchange: Callable[[jax.Array], jax.Array]) -> PyTree:
    """Exchanges the pieces of all leaves in one flat buffer per dtype.

    A shard holds a piece of every leaf, so that leaves, and with them groups, lie at the same place
    in every shard.

    Args:
        tree: leaves [*shape], each cut into `count` pieces.
        count: of shards.
        exchange: maps buffers [count, width of a shard] to shards [..., width].

    Returns:
        leaves [..., width of the leaf's piece].
    """
    leaves, treedef = jax.tree.flatten(tree)
    shards: list[Any] = [None] * len(leaves)
    for dtype, indices in _by_dtype(leaves).items():
        pieces = [_pieces(leaves[i], count) for i in indices]
        widths = [piece.shape[-1] for piece in pieces]
        padding = jnp.zeros((count, -sum(widths) % _ALIGNMENT), dtype)
        whole = exchange(jnp.concatenate([*pieces, padding], axis=-1))
        for i, end, width in zip(indices, itertools.accumulate(widths), widths, strict=True):
            shards[i] = whole[..., end - width : end]
    return treedef.unflatten(shards)


def from_shards(shards: PyTree, like: PyTree, axes: AxisName) -> PyTree:
    """Gathers over `axes` what `to_shards` cut: leaves of the shapes and dtypes of `like`."""
    leaves, treedef = jax.tree.flatten(like)
    own = jax.tree.leaves(shards)
    results: list[Any] = [None] * len(leaves)
    for dtype, indices in _by_dtype(leaves).items():
        widths = [own[i].size for i in indices]
        padding = jnp.zeros((-sum(widths) % _ALIGNMENT,), dtype)
        shard = jnp.concatenate([*(own[i].astype(dtype) for i in indices), padding])
        full = jax.lax.all_gather(shard, axes, to=_same_everywhere(axes))
        full = full.reshape(-1, shard.size)
        for i, end, width in zip(indices, itertools.accumulate(widths), widths, strict=True):
            flat = full[:, end - width : end].reshape(-1)
            results[i] = flat[: leaves[i].size].reshape(leaves[i].shape)
    return treedef.unflatten(results)


def mean_of_own_shard(buffer: jax.Array, axes: AxisName) -> jax.Array:
    """The mean over devices of the shard that is this device's, [width], of their [devices, width].

    Exchanged in the buffer's dtype, averaged in float32 or wider.
    """
    shards = jax.lax.all_to_all(buffer, axes, 0, 0, tiled=True)
    return jnp.mean(shards.astype(_inner_products.accumulation_dtype(buffer.dtype)), axis=0)


def _by_dtype(leaves: list[Any]) -> dict[Any, list[int]]:
    return {
        dtype: [i for i, leaf in enumerate(leaves) if leaf.dtype == dtype]
        for dtype in dict.fromkeys(leaf.dtype for leaf in leaves)
    }


def width(leaf: jax.Array, count: int) -> int:
    """Of the piece of a leaf in each of `count` shards."""
    return math.ceil(leaf.size / count)


def _pieces(leaf: jax.Array, count: int) -> jax.Array:
    """A leaf cut into `count` equal pieces, the last ones padded with zeros: [count, width]."""
    each = width(leaf, count)
    return jnp.pad(leaf.reshape(-1), (0, count * each - leaf.size)).reshape(count, each)


def _same_everywhere(axis_name: AxisName) -> Any:
    """How all_gather is told that its result no longer differs along the axis."""
    return (
        "invarying"
        if all(map(_inner_products.is_tracked, _inner_products.axes_of(axis_name)))
        else "varying"
    )
