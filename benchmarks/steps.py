"""A whole training step, against accumulating the same k gradients and against one big batch."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import models
import optax_bilevel
from benchmarks.timing import Timing, compare, temporary_bytes

PyTree = Any


class Case(NamedTuple):
    """A network and how a step's examples are cut up."""

    network: str
    input_shape: tuple[int, int, int]
    k: int
    b: int


CASES = {
    "mlp_8x8": Case("mlp_3x512", (28, 28, 3), 8, 8),
    "mlp_8x64": Case("mlp_3x512", (28, 28, 3), 8, 64),
    "cifarnet_8x16": Case("cifarnet", (28, 28, 3), 8, 16),
    "inception_8x8": Case("inception", (28, 28, 3), 8, 8),
    "preact_resnet18_8x4": Case("preact_resnet18", (32, 32, 3), 8, 4),
}


def problem(case: Case) -> tuple[Callable[..., Any], tuple[PyTree, PyTree]]:
    """The loss ``(params, batch) -> (loss, batch statistics)`` and (params, batches)."""
    model = models.create(
        case.network, num_classes=10, input_shape=case.input_shape, rngs=nnx.Rngs(0)
    )
    graph, params, stats = nnx.split(model, nnx.Param, ...)

    def loss_fn(params: PyTree, batch: PyTree) -> tuple[jax.Array, PyTree]:
        network = nnx.merge(graph, params, stats, copy=True)
        logits = network(batch["image"], rngs=nnx.Rngs(batch["key"]))
        loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return loss.mean(), nnx.state(network, nnx.BatchStat)

    key = jax.random.key(1)
    batches = {
        "image": jax.random.normal(key, (case.k, case.b, *case.input_shape)),
        "label": jax.random.randint(key, (case.k, case.b), 0, 10),
        "key": jax.random.split(key, case.k),
    }
    return loss_fn, (params, batches)


def candidates(loss_fn: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Steps that differ in how the k mini-batches become one gradient; all end in SGD."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    grad = jax.value_and_grad(loss_fn, has_aux=True)

    def finish(params: PyTree, grads: PyTree) -> PyTree:
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    def big_batch(params: PyTree, batches: PyTree) -> PyTree:
        whole = {
            name: x[0] if name == "key" else x.reshape(math.prod(x.shape[:2]), *x.shape[2:])
            for name, x in batches.items()
        }
        return finish(params, grad(params, whole)[1])

    def accumulate(params: PyTree, batches: PyTree) -> PyTree:
        total = None
        for i in range(len(batches["label"])):
            _, grads = grad(params, jax.tree.map(lambda x: x[i], batches))  # noqa: B023
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        return finish(params, total)

    def streaming(params: PyTree, batches: PyTree) -> PyTree:
        step = optax_bilevel.bilevel_value_and_grad(loss_fn, has_aux=True, chunk_size=None)
        return finish(params, step(params, batches)[1])

    def streaming_by_1(params: PyTree, batches: PyTree) -> PyTree:
        step = optax_bilevel.bilevel_value_and_grad(loss_fn, has_aux=True)
        return finish(params, step(params, batches)[1])

    def streaming_by_4(params: PyTree, batches: PyTree) -> PyTree:
        step = optax_bilevel.bilevel_value_and_grad(loss_fn, has_aux=True, chunk_size=4)
        return finish(params, step(params, batches)[1])

    rule = optax_bilevel.bilevel_reweight()

    def stacked(params: PyTree, batches: PyTree) -> PyTree:
        _, stack = jax.vmap(grad, in_axes=(None, 0))(params, batches)
        return finish(params, rule.update(stack, rule.init(params), params)[0])

    def stacked_unrolled(params: PyTree, batches: PyTree) -> PyTree:
        k = len(batches["label"])
        parts = [grad(params, jax.tree.map(lambda x: x[i], batches))[1] for i in range(k)]  # noqa: B023
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
        return finish(params, rule.update(stack, rule.init(params), params)[0])

    coherent_optimizer = optax_bilevel.coherent_steps(optimizer)

    def coherent(params: PyTree, batches: PyTree) -> PyTree:
        # Parameters for a direction: that of a fresh state is zeros, which XLA knows.
        state: Any = coherent_optimizer.init(params)
        state = state._replace(direction=params)
        step = optax_bilevel.coherent_value_and_grad(loss_fn, has_aux=True, chunk_size=None)
        _, mean, coherence = step(params, batches, state.direction)
        updates, state = coherent_optimizer.update(mean, state, params, coherence=coherence)
        return optax.apply_updates(params, updates), state.direction

    return {
        "accumulate": accumulate,
        "big_batch": big_batch,
        "streaming": streaming,
        "streaming_by_1": streaming_by_1,
        "streaming_by_4": streaming_by_4,
        "stacked": stacked,
        "stacked_unrolled": stacked_unrolled,
        "coherent": coherent,
    }


def measure(case: Case, rounds: int = 9) -> dict[str, Timing]:
    """Times every candidate on one case."""
    loss_fn, arguments = problem(case)
    return compare(candidates(loss_fn), arguments, rounds)


def temporary_memory(candidate: str, case: Case, ks: tuple[int, ...]) -> dict[int, int]:
    """Temporary bytes of a candidate's compiled step for several k at the same b."""
    result = {}
    for k in ks:
        loss_fn, arguments = problem(case._replace(k=k))
        step = candidates(loss_fn)[candidate]
        result[k] = temporary_bytes(jax.jit(step).lower(*arguments).compile())
    return result
