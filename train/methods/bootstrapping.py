"""Bootstrapping: the labels are mixed with what the network itself predicts (Reed et al., 2014).

"Training deep neural networks on noisy labels with bootstrapping", its soft and its hard loss. With
the given label t (one-hot) and the prediction q = softmax(logits)::

    soft: -Σ_k [β t_k + (1 - β) q_k] log q_k        (β = 0.95 there)
    hard: -Σ_k [β t_k + (1 - β) z_k] log q_k        (β = 0.8 there), z one-hot at argmax q

The soft loss is differentiated as it stands, q in the brackets included: it is the cross-entropy
regularised by the entropy of the prediction. z is a constant.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.methods import sgd
from train.methods.types import Method, Task

_BETA = {"soft": 0.95, "hard": 0.8}


def make(config: Any, task: Task) -> Method:
    """Takes `bootstrap` and `bootstrap_beta` from the config."""
    kind = config.bootstrap
    beta = _BETA[kind] if config.bootstrap_beta is None else config.bootstrap_beta

    def criterion(logits: jax.Array, labels: jax.Array) -> jax.Array:
        given = jax.nn.one_hot(labels, task.num_classes)
        if kind == "soft":
            predicted = jax.nn.softmax(logits)
        else:
            predicted = jax.nn.one_hot(jnp.argmax(logits, axis=-1), task.num_classes)
        return optax.losses.softmax_cross_entropy(logits, beta * given + (1 - beta) * predicted)

    gradient = functools.partial(sgd.gradient, criterion=criterion)
    return Method(gradient, f"{kind} bootstrapping with β = {beta:g}, {sgd.HOW}")
