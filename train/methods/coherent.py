"""Coherent steps, as the library's documentation has them: the optimizer wrapped, and no more.

The gradient is that of `sgd`, of a batch drawn at random. `optax_bilevel.coherent_steps` goes
around the run's optimizer and scales what that makes of the gradient by how far it lowers the
losses of examples that are held out, other ones at every step. Not in the paper.
"""

import functools
from typing import Any

import optax_bilevel
from train.methods import sgd
from train.methods.types import Method, Task

EXAMPLES = 16
"""How many held-out examples judge a step."""


def make(config: Any, task: Task) -> Method:
    """Needs from the config the number of steps alone."""
    return Method(
        sgd.gradient,
        f"{sgd.HOW}, steps of {config.optimizer} judged by {EXAMPLES} held-out ones",
        optimizer=functools.partial(
            optax_bilevel.coherent_steps, total_steps=config.epochs * task.steps_per_epoch
        ),
        judges=EXAMPLES,
    )
