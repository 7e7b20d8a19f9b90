"""Meshes: axes with explicit sharding, and the mapped axes of `jax.shard_map` and `jax.pmap`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

PyTree = Any
AxisName = Any  # a mesh or pmap axis name, or a tuple of them


def explicit_mesh(x: Any) -> Any:
    """The mesh that an array lives on if it has Explicit axes, else None."""
    mesh = jax.typeof(x).sharding.mesh
    return mesh if AxisType.Explicit in mesh.axis_types else None


def is_explicit(tree: PyTree) -> bool:
    """Whether a leaf lives on a mesh with Explicit axes."""
    return any(explicit_mesh(x) is not None for x in jax.tree.leaves(tree))


def first_axis_is_sharded(x: jax.Array) -> bool:
    """Whether the first axis is cut over an Explicit mesh, so that it cannot be sliced."""
    return explicit_mesh(x) is not None and jax.typeof(x).sharding.spec[0] is not None


def replicated(mesh: Any, ndim: int) -> NamedSharding:
    """The sharding of an array of so many axes that is the same on all devices."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * ndim))


def replicate(x: jax.Array) -> jax.Array:
    """Small results are the same on all devices; on Explicit meshes that has to be said."""
    mesh = explicit_mesh(x)
    return x if mesh is None else jax.sharding.reshard(x, replicated(mesh, x.ndim))


def replicate_like(x: jax.Array, tree: PyTree) -> jax.Array:
    """`x` on the Explicit mesh on which `tree` lives, so that a state's types never change."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and (mesh := explicit_mesh(leaf)) is not None:
            if isinstance(leaf, Tracer):
                return jax.sharding.reshard(x, replicated(mesh, x.ndim))
            assert isinstance(leaf.sharding, NamedSharding)
            return jax.device_put(x, replicated(leaf.sharding.mesh, x.ndim))
    return x


def axes_of(axis_name: AxisName) -> tuple[Any, ...]:
    """One axis name or several, as a tuple."""
    return tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)


def is_tracked(axis: Any) -> bool:
    """Whether types say what differs along the axis; not in pmap, nor with check_vma=False."""
    return axis in varying_axes(jax.lax.axis_index(axis))


def varying_axes(x: jax.Array) -> frozenset[Any]:
    """The mapped axes along which `x` is known to differ."""
    return jax.typeof(x).manual_axis_type.varying


def same_everywhere(axis_name: AxisName) -> Any:
    """How all_gather is told that its result no longer differs along the axis."""
    return "invarying" if all(map(is_tracked, axes_of(axis_name))) else "varying"


def vary(tree: PyTree, axis_name: AxisName) -> PyTree:
    """The same values, as each device's own: so are then gradients with respect to them."""
    axes = tuple(axis for axis in axes_of(axis_name) if is_tracked(axis))

    def leaf(x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        missing = tuple(axis for axis in axes if axis not in varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(leaf, tree)
