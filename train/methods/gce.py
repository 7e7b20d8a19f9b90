"""Generalized cross-entropy, a loss between cross-entropy and mean absolute error.

Zhang and Sabuncu, "Generalized cross entropy loss for training deep neural networks with noisy
labels" (2018), eq. (6): the loss of label y is L_q = (1 - p_y^q) / q, which is cross-entropy as
q goes to 0 and the mean absolute error, 1 - p_y, at q = 1. Its gradient is that of cross-entropy
times p_y^q: what the network believes to be wrong weighs little. q is `gce_q`, 0.7 there. Their
truncated loss, which leaves out examples for whole epochs, is not here.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from train.methods import sgd
from train.methods.types import Method, Task, cross_entropy


def make(config: Any, task: Task) -> Method:
    """Takes `gce_q` from the config."""
    del task

    def criterion(logits: jax.Array, labels: jax.Array) -> jax.Array:
        log_p = -cross_entropy(logits, labels)
        return -jnp.expm1(config.gce_q * log_p) / config.gce_q

    gradient = functools.partial(sgd.gradient, criterion=criterion)
    return Method(gradient, f"generalized cross-entropy with q = {config.gce_q:g}, {sgd.HOW}")
