"""How the k mini-batches of a step become one update: one method a file, one interface.

A module makes its `Method` from the config and the `Task`: a pure function from the parameters,
the k mini-batches and the method's own state to a `Gradient`. The loss function that it gets sees
one mini-batch. What changes the loss, the labels or the images wraps the loss function; what
weighs mini-batches decides how it is called; what judges the step wraps the optimizer; so the
three combine.
"""

from typing import Any

from train.methods import (
    azadi,
    bilevel,
    bootstrapping,
    coherent,
    elr,
    forms,
    gce,
    label_smoothing,
    mentornet,
    mixup,
    noise_layer,
    sgd,
    uniform,
)
from train.methods.types import Aux, Batch, Gradient, LossFn, Method, Task, cross_entropy

__all__ = [
    "NAMES",
    "Aux",
    "Batch",
    "Gradient",
    "LossFn",
    "Method",
    "Task",
    "check_form",
    "cross_entropy",
    "make",
]

_MAKERS = {
    "sgd": sgd.make,
    "uniform": uniform.make,
    "bilevel": bilevel.make,
    "bilevel_exact": bilevel.make_exact,
    "coherent": coherent.make,
    "coherent_mixup": coherent.make_mixup,
    "coherent_elr": coherent.make_elr,
    "bilevel_mixup": mixup.make_bilevel,
    "mixup": mixup.make,
    "label_smoothing": label_smoothing.make,
    "bootstrapping": bootstrapping.make,
    "gce": gce.make,
    "elr": elr.make,
    "noise_layer": noise_layer.make,
    "mentornet": mentornet.make,
    "azadi": azadi.make,
}

_ONE_LABEL = (
    "label_smoothing", "bootstrapping", "gce", "elr", "coherent_elr", "noise_layer", "mentornet",
)  # fmt: skip

NAMES = tuple(_MAKERS)
"""The names that `make` knows."""


def make(config: Any, task: Task) -> Method:
    """Makes the method that a config names.

    Raises:
        ValueError: if the method is for one label per example, and the task has several.
    """
    if task.multi_label and config.method in _ONE_LABEL:
        several = [name for name in NAMES if name not in _ONE_LABEL]
        raise ValueError(
            f"method {config.method} is for one label per example, and here an example can have "
            f"several: take one of {', '.join(several)}"
        )
    return _MAKERS[config.method](config, task)


def check_form(method: str, form: str) -> None:
    """Raises ValueError where a method cannot be computed in a form of the rule."""
    if form == "auto":
        return
    if not method.startswith("bilevel"):
        raise ValueError(f"method {method} weighs nothing: form {form} is for bilevel methods")
    if method == "bilevel_exact" and form not in forms.EXACT:
        raise ValueError(
            f"form {form} sees one gradient at a time, and bilevel_exact (eq. 8) needs all: "
            f"known: {', '.join(forms.EXACT)}"
        )
