"""What follows the gradient: clipping, weight decay, one of optax's optimizers, its schedule."""

from collections.abc import Callable
from typing import Any

import optax

import models

_MAKERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "adam": optax.adam,
    "adamw": optax.adamw,
    "nadamw": optax.nadamw,
    "lion": optax.lion,
    "rmsprop": optax.rmsprop,
}
NAMES = tuple(_MAKERS)
"""The names of `Config.optimizer`."""

RATES = {
    "sgd": 0.03,
    "adam": 1e-3,
    "adamw": 1e-3,
    "nadamw": 1e-3,
    "lion": 1e-4,
    "rmsprop": 1e-3,
}
"""The learning rates that are taken where none is given."""

DECOUPLED = ("adamw", "nadamw", "lion")
"""Those that decay weights apart from the gradient."""

MOMENTUM = ("sgd", "adam", "adamw", "nadamw", "lion")
"""Those that keep an average of gradients."""


def moves_on(config: Any) -> bool:
    """Whether there is a direction in which the optimizer has been going."""
    return config.optimizer in MOMENTUM or config.judged


def learning_rate(config: Any, steps_per_epoch: int) -> optax.Schedule:
    """The schedule by the count of optimizer steps."""
    total = config.epochs * steps_per_epoch
    rate = RATES[config.optimizer] if config.learning_rate is None else config.learning_rate
    match config.schedule:
        case "constant":
            return optax.constant_schedule(rate)
        case "exponential":
            return optax.exponential_decay(rate, steps_per_epoch, config.decay, staircase=True)
        case "steps":
            return optax.piecewise_constant_schedule(rate, {total // 2: 0.1, 3 * total // 4: 0.1})
        case _:
            return optax.linear_schedule(rate, 0.0, total)


def make(config: Any, steps_per_epoch: int) -> optax.GradientTransformation:
    """What follows the reweighting: clipping, weight decay on kernels, the optimizer."""
    parts, options = [], {}
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.optimizer in DECOUPLED:
        options = {"weight_decay": config.weight_decay, "mask": models.decay_mask}
    elif config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=models.decay_mask))
    if config.optimizer == "sgd":
        options = {"momentum": config.momentum}
    rate = learning_rate(config, steps_per_epoch)
    return optax.chain(*parts, _MAKERS[config.optimizer](rate, **options))


def direction(opt_state: Any) -> Any:
    """Where an optimizer of `MOMENTUM` has been going: its average of gradients."""
    for name in ("trace", "mu"):  # SGD's; Adam's and its kin's
        average = optax.tree.get(opt_state, name, None)
        if average is not None:
            return average
    raise ValueError("the optimizer keeps no average of gradients")
