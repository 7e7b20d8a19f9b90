"""Early-learning regularization: stay with what the network said of an example before.

Liu, Niles-Weed, Razavian and Fernandez-Granda, "Early-learning regularization prevents memorization
of noisy labels" (2020), eqs. (6) and (9). Every example i keeps a target, an average of the
network's probabilities p at its visits, and the loss draws p towards it::

    t_i ← β t_i + (1 - β) p_i        loss_i = -log p_i,y + λ log(1 - <p_i, t_i>)

t is a constant in the gradient, and starts from zero. As in the authors' released code, p is
clipped to [1e-4, 1 - 1e-4], and the average is of p divided by its sum. β is `elr_beta`, λ
`elr_lambda`: 0.7 and 3 there for CIFAR-10, 0.9 and 7 for CIFAR-100.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from train.methods import sgd
from train.methods.types import Batch, Gradient, LossFn, Method, PyTree, Task, cross_entropy

_SMALLEST = 1e-4


class Remembered(NamedTuple):
    """Labels of examples, and what the network said of them before.

    Attributes:
        given: int32 [b].
        targets: t, float32 [b, classes].
    """

    given: jax.Array
    targets: jax.Array


def make(config: Any, task: Task) -> Method:
    """Takes `elr_beta` and `elr_lambda` from the config; the state is t, [examples, classes]."""
    beta, weight = config.elr_beta, config.elr_lambda

    def advance(targets: jax.Array, p: jax.Array) -> jax.Array:
        p = jax.lax.stop_gradient(p)
        return beta * targets + (1 - beta) * p / jnp.sum(p, axis=-1, keepdims=True)

    def criterion(logits: jax.Array, labels: Remembered) -> jax.Array:
        p = _probabilities(logits)
        agreement = jnp.sum(p * advance(labels.targets, p), axis=-1)
        return cross_entropy(logits, labels.given) + weight * jnp.log1p(-agreement)

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: jax.Array) -> Gradient:
        indices = batches.indices
        if indices is None:
            raise ValueError("RawBatch.indices must say which examples these are")
        before = state[indices]
        remembered = batches._replace(labels=Remembered(batches.labels, before))
        done = sgd.gradient(loss_fn, params, remembered, criterion=criterion)
        p = _probabilities(done.aux.logits.reshape(before.shape))
        return done._replace(state=state.at[indices].set(advance(before, p)))

    return Method(
        gradient,
        f"early-learning regularization with β = {beta:g} and λ = {weight:g}, {sgd.HOW}",
        init=lambda params: jnp.zeros((task.num_examples, task.num_classes)),
        by_example=True,
    )


def _probabilities(logits: jax.Array) -> jax.Array:
    return jnp.clip(jax.nn.softmax(logits), _SMALLEST, 1 - _SMALLEST)
