"""Mini-batches one after the other, or some at a time: gradients that are added up and let go."""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_bilevel import _factors, _inner_products
from optax_bilevel._inner_products import PyTree

LOOPS = ("unroll", "scan")
_SMALL = 1 << 20  # entries: 4 MiB in float32


@dataclasses.dataclass(frozen=True)
class Stream:
    """How mini-batches are gone through; see `bilevel_value_and_grad`.

    Attributes:
        loss_fn: ``loss_fn(params, batch)``, with auxiliary data or without.
        has_aux: whether it has.
        loop: "unroll", "scan", or None for the better of them.
        chunk_size: how many to differentiate at a time; None for as many as take no more memory.

    Raises:
        ValueError: for an unknown loop and a chunk size out of range.
    """

    loss_fn: Callable[..., Any]
    has_aux: bool
    loop: str | None
    chunk_size: int | None

    def __post_init__(self) -> None:
        """Checks what it can."""
        if self.loop is not None and self.loop not in LOOPS:
            raise ValueError(f"unknown loop {self.loop!r}; known: None, {', '.join(LOOPS)}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(
                f"chunk_size must be a positive integer, got {self.chunk_size}; or None, which "
                "takes as many as fit"
            )

    def check_inputs(self, params: PyTree, batches: PyTree, num_validation: int) -> int:
        """How many mini-batches lead the leaves of `batches`, or ValueError."""
        count = _inner_products.leading_axis(batches, num_validation, what="batch")
        if not jax.tree.leaves(batches) or not jax.tree.leaves(params):
            raise ValueError("batches and params need at least one leaf each")
        return count

    def over(self, params: PyTree, batches: PyTree, *, among_themselves: bool = False) -> "Chunks":
        """With what was left open decided for these parameters and mini-batches.

        Args:
            params: of the network.
            batches: leaves [k, ...].
            among_themselves: whether gradients are compared with each other alone. With another
                direction a product compares in as many operations as it is formed in.
        """
        value_and_grad = jax.value_and_grad(_held(self.loss_fn, self.has_aux), has_aux=self.has_aux)
        unroll, size, apart, keep = self.loop == "unroll", self.chunk_size, False, None
        if self.loop is None or size is None:
            # In a loop, or vectorised, XLA runs convolutions several times slower there.
            slow = jax.default_backend() == "cpu" and _convolves(self.loss_fn, params, batches)
            unroll = unroll or (self.loop is None and slow)
            if size is None:
                count = self.check_inputs(params, batches, 0)
                size, apart = _fitting(value_and_grad, params, batches, count), slow
                if apart and size < count:
                    size = 1
                    if among_themselves and unroll:
                        # In place of one, the validation gradient and the sum: that, and factors.
                        keep = max(count / 2, 1)
        return Chunks(value_and_grad, params, batches, unroll, size, apart, keep)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The gradients of mini-batches, so many at a time.

    Attributes:
        value_and_grad: ``(params, batch, one)``, of one mini-batch.
        params: of the network.
        batches: leaves [k, ...].
        unroll: whether there is a copy of the network for every chunk.
        size: how many mini-batches are differentiated at a time.
        apart: whether each by itself, and not vectorised.
        keep: one by one, which gradients stay products to the end: those whose factors take, so
            many times, no more memory. None: all are formed.
    """

    value_and_grad: Callable[..., tuple[Any, PyTree]]
    params: PyTree
    batches: PyTree
    unroll: bool
    size: int
    apart: bool
    keep: float | None

    def differentiate(self, start: Any, size: int, one: Any = 1) -> tuple[Any, PyTree]:
        """Values and gradients of [start, start + size): stacks, or `Factored`."""
        if self.keep is not None:
            arguments = self.params, self._batch(start), one
            return _factors.evaluate(self.value_and_grad, *arguments, stacked=False, keep=self.keep)
        if size == 1:
            result = self.value_and_grad(self.params, self._batch(start), one)
            return jax.tree.map(lambda x: jnp.asarray(x)[None], result)
        if self.apart:
            return self._one_by_one(start, size, one)
        chunk = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), self.batches)
        stacked = jax.vmap(self.value_and_grad, in_axes=(None, 0, None))
        if _inner_products.is_explicit((self.params, chunk)):
            return stacked(self.params, chunk, one)  # a product would have to say its sharding
        return _factors.evaluate(stacked, self.params, chunk, one)

    def _one_by_one(self, start: Any, size: int, one: Any) -> tuple[Any, PyTree]:
        """As `differentiate`; a mini-batch starts when the last but one is done.

        Two at a time keep all cores busy; XLA would start all of them, and hold what each needs.
        """
        results: list[Any] = []
        done: list[Any] = [0, 0]
        for i in range(size):
            batch = self._batch(start + i + done[i])
            result = _factors.evaluate(self.value_and_grad, self.params, batch, one, stacked=False)
            results.append(result)
            done.append(_zero_after(result[1]))
        return jax.tree.map(lambda *x: _factors.concatenate(x), *results)

    def _batch(self, index: Any) -> PyTree:
        return jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), self.batches
        )

    def add_up(
        self,
        function: Callable[[Any, int, Any], tuple[PyTree, Any]],
        like: PyTree | None,
        begin: int,
        end: int,
        *,
        unroll: bool | None = None,
    ) -> tuple[PyTree, list[Any]]:
        """Adds up the first results of ``function(start, size, one)`` over [begin, end).

        Args:
            function: of a chunk; its first result is like `like`, leaves of its second lead with
                the size of the chunk.
            like: a tree of arrays, of the shapes, dtypes and shardings of the sum; not needed
                where all is unrolled.
            begin, end: of the mini-batches, at least one.
            unroll: in place of the attribute.

        Returns:
            the sum, `Factored` where its parts are, and a list of the second results.
        """
        total, records = None, []
        unroll = self.unroll if unroll is None else unroll
        if not unroll and (chunks := (end - begin) // self.size) > 1:
            # Over indices, not slices: slicing beforehand would copy the batches.
            total, record = jax.lax.scan(
                lambda total, start: _add(total, *function(start, self.size, 1)),
                jax.tree.map(jnp.zeros_like, like),
                begin + self.size * jnp.arange(chunks),
            )
            records.append(jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), record))
            begin += chunks * self.size
        total, more = _accumulate(function, total, begin, end, self.size)
        return total, records + more


def _convolves(loss_fn: Callable[..., Any], params: PyTree, batches: PyTree) -> bool:
    batch = jax.tree.map(lambda x: x[0], batches)
    return "conv_general_dilated" in str(jax.make_jaxpr(loss_fn)(params, batch))


def _fitting(
    value_and_grad: Callable[..., Any], params: PyTree, batches: PyTree, count: int
) -> int:
    """How many mini-batches to take at a time without more memory than one by one takes.

    One by one there are three gradients: one, the validation gradient and the sum. All at once
    there is the sum beside theirs, those of dense layers as factors; so many at a time, all three.
    What factors are made from and made into takes as much again. Small networks' gradients are
    taken all at once, whatever they are.
    """
    if _inner_products.is_explicit((params, batches)):
        return 1
    batch = jax.tree.map(lambda x: x[0], batches)
    own = _factors.count_entries(lambda *args: value_and_grad(*args)[1], params, batch, 1)
    one = sum(x.size for x in jax.tree.leaves(params))
    return count if count * own <= max(2 * one, _SMALL) else max(one // (2 * own), 1)


def _add(total: PyTree | None, part: PyTree, record: Any) -> tuple[PyTree, Any]:
    return part if total is None else jax.tree.map(operator.add, total, part), record


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

    XLA would start all mini-batches at once and hold all their gradients. Here a backward pass,
    whose result is another gradient, starts when the last has been added up, and a forward pass
    when the last but one has, beside a backward pass to keep all cores busy; or, where gradients
    are smaller because some stay products, the one before that.
    """
    records = []
    added: list[Any] = [0, 0, 0 if total is None else _zero_after(total)]
    for start in range(begin, end, chunk_size):
        size = min(chunk_size, end - start)
        products = any(isinstance(x, _factors.Factored) for x in jax.tree.leaves(total))
        total, record = _add(
            total, *function(start + added[-3 if products else -2], size, 1 + added[-1])
        )
        added.append(_zero_after(total))
        records.append(record)
    return total, records


def _zero_after(total: PyTree) -> jax.Array:
    """A zero, int32 [], that is not known before every leaf of `total` is, or its last part.

    An optimization barrier would not do: the CPU backend drops it before scheduling.
    """
    # Of a sum of products the rows that came last.
    leaves = (x.last if isinstance(x, _factors.Factored) else [x] for x in jax.tree.leaves(total))
    arrays = [x for part in leaves for x in part if x.size]
    entries = [jnp.real(_inner_products.probe(x)) for x in arrays]
    dependency = sum(jnp.abs(jnp.nan_to_num(x.astype(jnp.float32))) for x in entries)
    return jnp.minimum(dependency, 0).astype(jnp.int32)
