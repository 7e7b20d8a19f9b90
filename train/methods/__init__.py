"""How the k mini-batches of a step become one gradient: one method a file, one interface.

A method is a function ``(loss_fn, params, batches) -> Gradient``; its module makes it from the
config (`make`). ``loss_fn(params, batch) -> (loss, aux)`` sees one mini-batch; leaves of `batches`
lead with [k, b], but for the mini-batches' random keys [k].
"""

from typing import Any

from train.methods import bilevel, sgd, uniform
from train.methods.types import Batch, Gradient, LossFn, Method

__all__ = ["NAMES", "Batch", "Gradient", "LossFn", "Method", "check_form", "make"]

_MAKERS = {
    "sgd": sgd.make,
    "uniform": uniform.make,
    "bilevel": bilevel.make,
    "bilevel_exact": bilevel.make_exact,
}

NAMES = tuple(_MAKERS)
"""The names that `make` knows."""


def make(config: Any) -> tuple[Method, str]:
    """Makes the method that a config names; returns it with a line that says how it computes."""
    return _MAKERS[config.method](config)


def check_form(method: str, form: str) -> None:
    """Raises ValueError where a method cannot be computed in a form of the rule."""
    if form == "auto":
        return
    if method in ("sgd", "uniform"):
        raise ValueError(f"method {method} weighs nothing: form {form} is for bilevel methods")
    if method == "bilevel_exact" and form not in bilevel.EXACT_FORMS:
        raise ValueError(
            f"form {form} sees one gradient at a time, and bilevel_exact (eq. 8) needs all: "
            f"known: {', '.join(bilevel.EXACT_FORMS)}"
        )
