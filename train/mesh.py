"""Where the k mini-batches of a step lie: a mesh of all devices, in one of three layouts.

With D devices in all, of all processes, the mesh has two axes, `BATCH` for the mini-batches and
`EXAMPLE` for the examples of one::

    k     mesh    every device has
    D     D × 1   one mini-batch
    m·D   D × 1   m mini-batches
    D/e   k × e   1/e of the examples of one mini-batch
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PyTree = Any

BATCH, EXAMPLE = "batch", "example"
ALL = (BATCH, EXAMPLE)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a step lies on a mesh.

    Attributes:
        mesh: of the axes `BATCH` and `EXAMPLE`, both left to the compiler outside `shard_map`.
        per_device: m, mini-batches on each device; 1 where a device has a part of one.
        sharded: whether parameters and optimizer state are spread over all devices (in the way of
            FSDP), or copied to each.
    """

    mesh: Mesh
    per_device: int
    sharded: bool = False

    @property
    def spread(self) -> int:
        """Over how many devices the examples of one mini-batch are spread."""
        return self.mesh.shape[EXAMPLE]

    @property
    def replicated(self) -> NamedSharding:
        """The same on all devices."""
        return NamedSharding(self.mesh, P())

    def describe(self) -> str:
        """For a line of the program's output."""
        if self.spread > 1:
            each = f"1/{self.spread} of a mini-batch"
        else:
            each = f"{self.per_device} mini-batch{'es' * (self.per_device > 1)}"
        processes = jax.process_count()
        where = f" of {processes} processes" if processes > 1 else ""
        stored = ", parameters sharded" if self.sharded else ""
        return f"{self.mesh.size} devices{where}, {each} on each{stored}"

    def parameter_shardings(self, tree: PyTree) -> PyTree:
        """Where the leaves of parameters, or of a tree made of such, are kept.

        Sharded: each leaf along its longest axis that all devices share evenly; leaves without
        one are copied to each.
        """
        return jax.tree.map(self._parameter_sharding, tree)

    def _parameter_sharding(self, leaf: Any) -> NamedSharding:
        even = [axis for axis, size in enumerate(leaf.shape) if size and not size % self.mesh.size]
        if not self.sharded or not even:
            return self.replicated
        longest = max(even, key=lambda axis: leaf.shape[axis])
        return NamedSharding(self.mesh, P(*(None,) * longest, ALL))

    def everywhere(self, tree: PyTree) -> PyTree:
        """Inside jit: every leaf whole on every device."""
        return jax.lax.with_sharding_constraint(tree, self.replicated)

    def per_example(self, function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """Inside jit: ``function``, of leaves [k, b, ...], where the examples are."""
        spec = P(BATCH, EXAMPLE)
        return jax.shard_map(function, mesh=self.mesh, in_specs=spec, out_specs=spec)

    # ------------------------------------------------------------------ from the host's memory

    def part(self, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        """What this process loads of an array [k, b], or of a batch [n] to evaluate: an index."""
        sharding = self.data_sharding(len(shape))
        indices = sharding.addressable_devices_indices_map(shape).values()
        axes = []
        for axis, size in enumerate(shape):
            places = [np.arange(size)[index[axis]] for index in indices if index is not None]
            axes.append(np.unique(np.concatenate(places)))
        return np.ix_(*axes)

    def place(self, arrays: PyTree, shape: tuple[int, ...]) -> PyTree:
        """Puts together global arrays that lead with `shape` of what each process has loaded."""
        sharding = self.data_sharding(len(shape))

        def leaf(x: np.ndarray) -> jax.Array:
            whole = (*shape, *x.shape[len(shape) :])
            return jax.make_array_from_process_local_data(sharding, x, whole)

        return jax.tree.map(leaf, arrays)

    def data_sharding(self, ndim: int) -> NamedSharding:
        """Where arrays that lead with [k, b] (`ndim` 2), or batches to evaluate (1), lie."""
        return NamedSharding(self.mesh, P(BATCH, EXAMPLE) if ndim == 2 else P(ALL))

    def copy(self, tree: PyTree, shardings: PyTree | None = None) -> PyTree:
        """Puts values that every process has on the mesh; by default on every device whole."""
        shardings = shardings or jax.tree.map(lambda _: self.replicated, tree)

        def leaf(x: jax.Array, sharding: NamedSharding) -> jax.Array:
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                data = leaf(jax.random.key_data(x), sharding)
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
            values = np.asarray(x)
            return jax.make_array_from_callback(x.shape, sharding, lambda index: values[index])

        return jax.tree.map(leaf, tree, shardings)


def choose(k: int, b: int, num_devices: int | None = None, *, sharded: bool = False) -> Layout:
    """The layout of k mini-batches of b examples on the first `num_devices` devices, or on all.

    Raises:
        ValueError: naming the k (or b) that fit the devices.
    """
    return on(_devices(num_devices), k, b, sharded=sharded)


def on(devices: Sequence[Any], k: int, b: int, *, sharded: bool = False) -> Layout:
    """As `choose`, on these devices, which need not be at hand."""
    count = len(devices)
    spread = count // math.gcd(k, count)
    if k % count and count % k:
        below = [size for size in range(2, count) if not count % size]
        known = ", ".join(map(str, [*below, count, 2 * count, 3 * count]))
        raise ValueError(
            f"k = {k} mini-batches do not fit {count} devices: k must divide their number or be "
            f"a multiple of it ({known}, …); or take another number of devices"
        )
    if b % spread:
        raise ValueError(
            f"each of the k = {k} mini-batches lies on {spread} of the {count} devices, and "
            f"b = {b} examples cannot be shared evenly by them: b must be a multiple of {spread}"
        )
    shape = (count // spread, spread)
    types = (AxisType.Auto,) * 2
    mesh = jax.make_mesh(shape, ALL, axis_types=types, devices=devices)
    return Layout(mesh, per_device=max(k // count, 1), sharded=sharded)


def _devices(count: int | None) -> list[Any]:
    devices = jax.devices()
    if count is None or count == len(devices):
        return devices
    if jax.process_count() > 1:
        raise ValueError(f"{count} devices of {len(devices)}: several processes use all devices")
    if not 1 <= count <= len(devices):
        raise ValueError(f"devices must be from 1 to the {len(devices)} there are, got {count}")
    return devices[:count]


def example_axis() -> str | None:
    """The axis on whose devices the examples of the mini-batch at hand are spread, if any.

    So batch norm can take the statistics of the whole mini-batch. None outside of `shard_map`.
    """
    try:
        return EXAMPLE if jax.lax.axis_size(EXAMPLE) > 1 else None
    except NameError:  # not a mapped axis here
        return None
