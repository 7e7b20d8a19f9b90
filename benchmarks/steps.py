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
    """A network, how a step's examples are cut up, and how many times as many rounds it takes."""

    network: str
    input_shape: tuple[int, int, int]
    k: int
    b: int
    times: int = 1


CASES = {  # steps of milliseconds vary most
    "mlp_8x8": Case("mlp_3x512", (28, 28, 3), 8, 8, times=5),
    "mlp_8x64": Case("mlp_3x512", (28, 28, 3), 8, 64, times=5),
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


class Candidate(NamedTuple):
    """A training step, and where it starts.

    Attributes:
        step: ``(state, batches) -> state``.
        init: ``params -> state``, the parameters and the optimizer's state.
    """

    step: Callable[..., Any]
    init: Callable[..., Any]


_SGD = optax.sgd(1e-3, momentum=0.9)


def _candidate(gradient: Callable[..., PyTree], *before: optax.GradientTransformation) -> Candidate:
    """SGD with momentum on ``gradient(params, batches)``, after `before`."""
    optimizer = optax.chain(*before, _SGD)

    def step(state: PyTree, batches: PyTree) -> PyTree:
        params, opt_state = state
        updates, opt_state = optimizer.update(gradient(params, batches), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return Candidate(step, lambda params: (params, optimizer.init(params)))


def candidates(loss_fn: Callable[..., Any]) -> dict[str, Candidate]:
    """Steps that differ in how the k mini-batches become one gradient."""
    grad = jax.value_and_grad(loss_fn, has_aux=True)

    def one_of(batches: PyTree, i: int) -> PyTree:
        return jax.tree.map(lambda x: x[i], batches)

    def big_batch(params: PyTree, batches: PyTree) -> PyTree:
        whole = {
            name: x[0] if name == "key" else x.reshape(math.prod(x.shape[:2]), *x.shape[2:])
            for name, x in batches.items()
        }
        return grad(params, whole)[1]

    def accumulate(params: PyTree, batches: PyTree) -> PyTree:
        total = None
        for i in range(len(batches["label"])):
            _, grads = grad(params, one_of(batches, i))
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        return total

    def accumulate_weighted(params: PyTree, batches: PyTree) -> PyTree:
        # The least that any such rule must do, in whatever order and memory XLA likes.
        first = total = grad(params, one_of(batches, 0))[1]
        for i in range(1, len(batches["label"])):
            _, grads = grad(params, one_of(batches, i))
            omega = optax.tree.vdot(first, grads) / (optax.tree.norm(grads, squared=True) + 0.01)
            total = optax.tree.add_scale(total, omega, grads)
        return total

    def streaming(chunk_size: int | None) -> Candidate:
        step = optax_bilevel.bilevel_value_and_grad(loss_fn, has_aux=True, chunk_size=chunk_size)
        return _candidate(lambda params, batches: step(params, batches)[1])

    def stacked(params: PyTree, batches: PyTree) -> PyTree:
        return jax.vmap(grad, in_axes=(None, 0))(params, batches)[1]

    def stacked_unrolled(params: PyTree, batches: PyTree) -> PyTree:
        parts = [grad(params, one_of(batches, i))[1] for i in range(len(batches["label"]))]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)

    coherent_optimizer = optax_bilevel.coherent_steps(_SGD)

    def coherent(state: PyTree, batches: PyTree) -> PyTree:
        params, opt_state = state
        step = optax_bilevel.coherent_value_and_grad(loss_fn, has_aux=True, chunk_size=None)
        _, mean, coherence = step(params, batches, opt_state.direction)
        updates, opt_state = coherent_optimizer.update(mean, opt_state, params, coherence=coherence)
        return optax.apply_updates(params, updates), opt_state

    rule = optax_bilevel.bilevel_reweight()
    return {
        "accumulate": _candidate(accumulate),
        "accumulate_weighted": _candidate(accumulate_weighted),
        "big_batch": _candidate(big_batch),
        "streaming": streaming(None),
        "streaming_by_1": streaming(1),
        "streaming_by_4": streaming(4),
        "stacked": _candidate(stacked, rule),
        "stacked_unrolled": _candidate(stacked_unrolled, rule),
        "coherent": Candidate(coherent, lambda params: (params, coherent_optimizer.init(params))),
    }


def compare_steps(
    candidates: dict[str, Candidate], params: PyTree, batches: PyTree, rounds: int
) -> dict[str, Timing]:
    """Times training steps, each of which goes on from its last."""
    return compare(
        {name: candidate.step for name, candidate in candidates.items()},
        (batches,),
        rounds,
        states={name: candidate.init(params) for name, candidate in candidates.items()},
    )


def measure(case: Case, rounds: int = 9) -> dict[str, Timing]:
    """Times every candidate on one case, ``case.times * rounds`` times."""
    loss_fn, arguments = problem(case)
    return compare_steps(candidates(loss_fn), *arguments, case.times * rounds)


def temporary_memory(candidate: str, case: Case, ks: tuple[int, ...]) -> dict[int, int]:
    """Temporary bytes of a candidate's compiled step for several k at the same b."""
    result = {}
    for k in ks:
        loss_fn, (params, batches) = problem(case._replace(k=k))
        step, init = candidates(loss_fn)[candidate]
        compiled = jax.jit(step, donate_argnums=0).lower(init(params), batches).compile()
        result[k] = temporary_bytes(compiled)
    return result
