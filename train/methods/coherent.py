"""Coherent steps, as the library's documentation has them: the optimizer wrapped, and no more.

The gradient is that of another method, of a batch drawn at random: `sgd`, or with `coherent_mixup`
and `coherent_elr` that of `mixup` and `elr`. `optax_bilevel.coherent_steps` goes around the run's
optimizer and scales what that makes of the gradient by how far it lowers the losses of examples
that are held out, other ones at every step. Not in the paper.
"""

import dataclasses
import functools
from typing import Any

import optax_bilevel
from train.methods import elr, mixup, sgd
from train.methods.types import Method, Task

EXAMPLES = 16
"""How many held-out examples judge a step."""


def make(config: Any, task: Task) -> Method:
    """Needs from the config the number of steps alone."""
    return _judged(sgd.make(config, task), config, task)


def make_mixup(config: Any, task: Task) -> Method:
    """Coherent steps along the gradient of `mixup`."""
    return _judged(mixup.make(config, task), config, task)


def make_elr(config: Any, task: Task) -> Method:
    """Coherent steps along the gradient of `elr`."""
    return _judged(elr.make(config, task), config, task)


def _judged(method: Method, config: Any, task: Task) -> Method:
    return dataclasses.replace(
        method,
        how=f"{method.how}, steps of {config.optimizer} judged by {EXAMPLES} held-out ones",
        optimizer=functools.partial(
            optax_bilevel.coherent_steps, total_steps=config.epochs * task.steps_per_epoch
        ),
        judges=EXAMPLES,
    )
