"""Label smoothing, the `sgd` control with softened labels (Szegedy et al., 2016).

"Rethinking the Inception architecture for computer vision", section 7: the label y of an example
becomes the distribution q'(k) = (1 - ε) δ(k, y) + ε / K over the K classes, and the loss
-Σ_k q'(k) log p(k). ε is `smoothing`, 0.1 there and in table 3.
"""

import functools
from typing import Any

import jax
import optax

from train.methods import sgd
from train.methods.types import Method, Task


def make(config: Any, task: Task) -> Method:
    """Takes `smoothing` from the config."""

    def criterion(logits: jax.Array, labels: jax.Array) -> jax.Array:
        one_hot = jax.nn.one_hot(labels, task.num_classes)
        return optax.losses.softmax_cross_entropy(
            logits, optax.losses.smooth_labels(one_hot, config.smoothing)
        )

    gradient = functools.partial(sgd.gradient, criterion=criterion)
    return Method(gradient, f"labels smoothed by {config.smoothing:g}, {sgd.HOW}")
