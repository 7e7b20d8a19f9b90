"""The paper's rule, eq. (10), or eq. (8) for `bilevel_exact`, in any of its `forms`."""

from typing import Any

import models
from train.methods import forms
from train.methods.types import Method, Task


def make(config: Any, task: Task) -> Method:
    """Eq. (10)."""
    return _make(config, task, "diagonal")


def make_exact(config: Any, task: Task) -> Method:
    """Eq. (8), which needs all gradients."""
    return _make(config, task, "exact")


def _make(config: Any, task: Task, solver: str) -> Method:
    form, how = forms.choose(config, task, solver)
    options = {
        "lam": config.lam,
        "mu": config.mu,
        "num_validation": config.num_validation,
        "normalize": config.normalize,
        "nonnegative": config.nonnegative,
        "groups": {"all": None, "leaf": "leaf", "layer": models.layer_labels}[config.groups],
    }
    if form in forms.EXACT:
        options["solver"] = solver
    if task.layout is None:
        return Method(forms.ON_ONE_DEVICE[form](config.k, options), how)
    # To send them round would cost as much as a tenth of a gradient.
    copies = config.num_validation if form == "streaming" else 0
    return Method(forms.ON_MESH[form](task.layout, options), how, copies=copies)
