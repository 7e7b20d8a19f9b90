"""Mini-batches one after the other: gradients that are added up and let go."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_bilevel import _inner_products
from optax_bilevel._inner_products import PyTree

LOOPS = ("unroll", "scan")


@dataclasses.dataclass(frozen=True)
class Stream:
    """How mini-batches are gone through; see `bilevel_value_and_grad`.

    Attributes:
        loss_fn: ``loss_fn(params, batch)``, with auxiliary data or without.
        has_aux: whether it has.
        loop: "unroll", "scan", or None for the better of them.
        chunk_size: how many to differentiate at a time.

    Raises:
        ValueError: for an unknown loop and a chunk size out of range.
    """

    loss_fn: Callable[..., Any]
    has_aux: bool
    loop: str | None
    chunk_size: int

    def __post_init__(self) -> None:
        """Checks what it can."""
        if self.loop is not None and self.loop not in LOOPS:
            raise ValueError(f"unknown loop {self.loop!r}; known: None, {', '.join(LOOPS)}")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be a positive integer, got {self.chunk_size}")

    def check_inputs(self, params: PyTree, batches: PyTree, num_validation: int) -> int:
        """How many mini-batches lead the leaves of `batches`, or ValueError."""
        count = _inner_products.leading_axis(batches, num_validation, what="batch")
        if not jax.tree.leaves(batches) or not jax.tree.leaves(params):
            raise ValueError("batches and params need at least one leaf each")
        return count

    def differentiate(self, params: PyTree, batches: PyTree) -> Callable[..., tuple[Any, PyTree]]:
        """``(start, size, one) -> values and gradients`` of [start, start + size), stacked."""
        value_and_grad = jax.value_and_grad(_held(self.loss_fn, self.has_aux), has_aux=self.has_aux)

        def differentiate(start: Any, size: int, one: Any) -> tuple[Any, PyTree]:
            if size > 1:
                chunk = jax.tree.map(
                    lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), batches
                )
                return jax.vmap(value_and_grad, in_axes=(None, 0, None))(params, chunk, one)
            batch = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, start, keepdims=False), batches
            )
            return jax.tree.map(lambda x: jnp.asarray(x)[None], value_and_grad(params, batch, one))

        return differentiate

    def unrolls(self, params: PyTree, batches: PyTree) -> bool:
        """Whether there is a copy of the network for every chunk."""
        return (self.loop or _best_loop(self.loss_fn, params, batches)) == "unroll"

    def add_up(
        self,
        function: Callable[[Any, int, Any], tuple[PyTree, Any]],
        like: PyTree | None,
        begin: int,
        end: int,
        *,
        unroll: bool,
    ) -> tuple[PyTree, list[Any]]:
        """Adds up the first results of ``function(start, size, one)`` over [begin, end).

        Args:
            function: of a chunk; its first result is like `like`, leaves of its second lead with
                the size of the chunk.
            like: a tree of arrays, of the shapes, dtypes and shardings of the sum; not needed
                where all is unrolled.
            begin, end: of the mini-batches, at least one.
            unroll: as `unrolls` has it.

        Returns:
            the sum, and a list of the second results.
        """
        total, records = None, []
        if not unroll and (chunks := (end - begin) // self.chunk_size) > 1:
            # Over indices, not slices: slicing beforehand would copy the batches.
            total, record = jax.lax.scan(
                lambda total, start: _add(total, *function(start, self.chunk_size, 1)),
                jax.tree.map(jnp.zeros_like, like),
                begin + self.chunk_size * jnp.arange(chunks),
            )
            records.append(jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), record))
            begin += chunks * self.chunk_size
        total, more = _accumulate(function, total, begin, end, self.chunk_size)
        return total, records + more


def _best_loop(loss_fn: Callable[..., Any], params: PyTree, batches: PyTree) -> str:
    if jax.default_backend() != "cpu":
        return "scan"
    batch = jax.tree.map(lambda x: x[0], batches)
    convolves = "conv_general_dilated" in str(jax.make_jaxpr(loss_fn)(params, batch))
    return "unroll" if convolves else "scan"


def _add(total: PyTree | None, part: PyTree, record: Any) -> tuple[PyTree, Any]:
    return part if total is None else jax.tree.map(jnp.add, total, part), record


def _held(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    """``loss_fn(params, batch)`` times `one`, without which its backward pass cannot start."""

    def held(params: PyTree, batch: PyTree, one: Any) -> Any:
        def hold(loss: PyTree) -> PyTree:
            return jax.tree.map(lambda x: x * jnp.asarray(one, jnp.result_type(x)), loss)

        result = loss_fn(params, batch)
        if has_aux and isinstance(result, tuple):
            return hold(result[0]), *result[1:]
        return hold(result)

    return held


def _accumulate(
    function: Callable[[Any, int, Any], tuple[PyTree, Any]],
    total: PyTree | None,
    begin: int,
    end: int,
    chunk_size: int,
) -> tuple[Any, list[Any]]:
    """Adds up the first results of ``function(start, size, one)`` over [begin, end), unrolled.

    XLA would start all mini-batches at once and hold all their gradients. Here a forward pass
    starts when the last mini-batch but one has been added up, beside the last one's backward pass
    to keep all cores busy; a backward pass, whose result is another gradient, when the last has.
    """
    records = []
    before, last = 0, 0 if total is None else _zero_after(total)
    for start in range(begin, end, chunk_size):
        size = min(chunk_size, end - start)
        total, record = _add(total, *function(start + before, size, 1 + last))
        before, last = last, _zero_after(total)
        records.append(record)
    return total, records


def _zero_after(total: PyTree) -> jax.Array:
    """A zero, int32 [], that is not known before every leaf of `total` is.

    An optimization barrier would not do: the CPU backend drops it before scheduling.
    """
    entries = [jnp.real(_inner_products.probe(x)) for x in jax.tree.leaves(total) if x.size]
    dependency = sum(jnp.abs(jnp.nan_to_num(x.astype(jnp.float32))) for x in entries)
    return jnp.minimum(dependency, 0).astype(jnp.int32)
