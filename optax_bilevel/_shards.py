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


def exchange(tree: PyTree, axes: AxisName, spread: int) -> PyTree:
    """This device's shard of every device's gradient, averaged over each `spread` neighbours.

    Sent in the gradients' dtypes, averaged in float32 or wider.

    Args:
        tree: leaves [*shape].
        axes: of the D devices.
        spread: how many devices in a row share a mini-batch.

    Returns:
        leaves [D/spread, width of the leaf's piece].
    """

    def send(buffer: jax.Array) -> jax.Array:
        shards = jax.lax.all_to_all(buffer, axes, 0, 0, tiled=True)
        if spread > 1:  # the examples of a mini-batch, averaged here rather than on the way
            shards = shards.astype(_inner_products.accumulation_dtype(buffer.dtype))
            shards = jnp.mean(shards.reshape(-1, spread, shards.shape[1]), axis=1)
        return shards

    return _cut(tree, jax.lax.axis_size(axes), send)


def own(tree: PyTree, axes: AxisName) -> PyTree:
    """This device's shard of a tree that is the same on all: leaves [width of the piece]."""
    place = jax.lax.axis_index(axes)
    return _cut(tree, jax.lax.axis_size(axes), lambda buffer: buffer[place])


def _cut(tree: PyTree, count: int, shards_of: Callable[[jax.Array], jax.Array]) -> PyTree:
    """Cuts all leaves into `count` pieces, in one flat buffer [count, width of a shard] per dtype.

    A shard holds a piece of every leaf, so that leaves, and with them groups, lie at the same place
    in every shard. Leaves are [..., width of the piece] of what `shards_of` makes of a buffer.
    """
    leaves, treedef = jax.tree.flatten(tree)
    shards: list[Any] = [None] * len(leaves)
    for dtype, indices in _by_dtype(leaves).items():
        pieces = [_pieces(leaves[i], count) for i in indices]
        widths = [piece.shape[-1] for piece in pieces]
        padding = jnp.zeros((count, -sum(widths) % _ALIGNMENT), dtype)
        whole = shards_of(jnp.concatenate([*pieces, padding], axis=-1))
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
        full = jax.lax.all_gather(shard, axes, to=_same_everywhere(axes))
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
