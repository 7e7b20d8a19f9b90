"""A whole training step in every form, beside the plain optimizer's on the same examples."""

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
HELD_OUT = 16  # examples that judge a coherent step


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


class Problem(NamedTuple):
    """What a step is given.

    Attributes:
        losses: ``(params, batch) -> (losses [b], batch statistics)`` of a network in training mode.
        params: its parameters.
        batches: k mini-batches of b examples, leaves [k, b, ...], and a random key of each.
        held_out: `HELD_OUT` more examples, with a random key.
    """

    losses: Callable[..., Any]
    params: PyTree
    batches: PyTree
    held_out: PyTree

    def mean_loss(self, params: PyTree, batch: PyTree) -> tuple[jax.Array, PyTree]:
        """The loss of a mini-batch, and its batch statistics."""
        losses, stats = self.losses(params, batch)
        return losses.mean(), stats


def problem(case: Case) -> Problem:
    """Random images, for speed does not depend on what they show."""
    model = models.create(
        case.network, num_classes=10, input_shape=case.input_shape, rngs=nnx.Rngs(0)
    )
    graph, params, stats = nnx.split(model, nnx.Param, ...)

    def losses(params: PyTree, batch: PyTree) -> tuple[jax.Array, PyTree]:
        network = nnx.merge(graph, params, stats, copy=True)
        logits = network(batch["image"], rngs=nnx.Rngs(batch["key"]))
        each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return each, nnx.state(network, nnx.BatchStat)

    def examples(key: jax.Array, *shape: int) -> PyTree:
        return {
            "image": jax.random.normal(key, (*shape, *case.input_shape)),
            "label": jax.random.randint(key, shape, 0, 10),
            "key": jax.random.split(key, shape[:-1]),
        }

    key = jax.random.key(1)
    return Problem(losses, params, examples(key, case.k, case.b), examples(key, HELD_OUT))


class Candidate(NamedTuple):
    """A training step, and where it starts.

    Attributes:
        step: ``(state, batches, held_out) -> state``.
        init: ``params -> state``, the parameters and the optimizer's state.
    """

    step: Callable[..., Any]
    init: Callable[..., Any]


_SGD = optax.sgd(1e-3, momentum=0.9)


def candidates(of: Problem) -> dict[str, Candidate]:
    """Steps of SGD with momentum that differ in how the examples become an update."""
    grad = jax.value_and_grad(of.mean_loss, has_aux=True)

    def candidate(
        gradient: Callable[..., PyTree],
        optimizer: Any = _SGD,
        told: Callable[[PyTree], dict[str, Any]] = lambda held_out: {},
    ) -> Candidate:
        def step(state: PyTree, batches: PyTree, held_out: PyTree) -> PyTree:
            params, opt_state = state
            grads = gradient(params, batches)
            updates, opt_state = optimizer.update(grads, opt_state, params, **told(held_out))
            return optax.apply_updates(params, updates), opt_state

        return Candidate(step, lambda params: (params, optimizer.init(params)))

    def one_of(batches: PyTree, i: int) -> PyTree:
        return jax.tree.map(lambda x: x[i], batches)

    def plain(params: PyTree, batches: PyTree) -> PyTree:
        whole = {
            name: x[0] if name == "key" else x.reshape(math.prod(x.shape[:2]), *x.shape[2:])
            for name, x in batches.items()
        }
        return grad(params, whole)[1]

    def each(params: PyTree, batches: PyTree) -> list[PyTree]:
        return [grad(params, one_of(batches, i))[1] for i in range(len(batches["label"]))]

    def accumulate(params: PyTree, batches: PyTree) -> PyTree:
        return jax.tree.map(lambda *leaves: sum(leaves), *each(params, batches))

    def stacked(params: PyTree, batches: PyTree) -> PyTree:
        # On CPU vmap makes grouped convolutions of those that give weight gradients.
        if jax.default_backend() == "cpu" and any(x.ndim > 2 for x in jax.tree.leaves(params)):
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each(params, batches))
        return jax.vmap(grad, in_axes=(None, 0))(params, batches)[1]

    def streaming(microbatch_size: int | None) -> Candidate:
        step = optax_bilevel.bilevel_value_and_grad(
            of.mean_loss, has_aux=True, microbatch_size=microbatch_size
        )
        return candidate(lambda params, batches: step(params, batches)[1])

    return {
        "plain": candidate(plain),
        "coherent": candidate(
            plain,
            optax_bilevel.coherent_steps(_SGD, total_steps=10_000),
            lambda held_out: {"losses_fn": lambda params: of.losses(params, held_out)[0]},
        ),
        "accumulate": candidate(accumulate),
        "streaming": streaming(None),
        "streaming_by_1": streaming(1),
        "stacked": candidate(stacked, optax.chain(optax_bilevel.bilevel_reweight(), _SGD)),
    }


def compare_steps(candidates: dict[str, Candidate], of: Problem, rounds: int) -> dict[str, Timing]:
    """Times training steps, each of which goes on from its last."""
    return compare(
        {name: candidate.step for name, candidate in candidates.items()},
        (of.batches, of.held_out),
        rounds,
        states={name: candidate.init(of.params) for name, candidate in candidates.items()},
    )


def measure(case: Case, rounds: int = 9) -> dict[str, Timing]:
    """Times every candidate on one case, ``case.times * rounds`` times."""
    of = problem(case)
    return compare_steps(candidates(of), of, case.times * rounds)


def temporary_memory(candidate: str, case: Case, ks: tuple[int, ...]) -> dict[int, int]:
    """Temporary bytes of a candidate's compiled step for several k at the same b."""
    result = {}
    for k in ks:
        of = problem(case._replace(k=k))
        step, init = candidates(of)[candidate]
        jitted = jax.jit(step, donate_argnums=0)
        compiled = jitted.lower(init(of.params), of.batches, of.held_out).compile()
        result[k] = temporary_bytes(compiled)
    return result
