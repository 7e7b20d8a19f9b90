"""The paper's tables and figures and a study of our own: ``python -m train experiment NAME``.

Each has two scales, for a laptop and for the paper's data. One file is one table or figure: its
docstring gives the command, the paper's numbers, what it needs and what was measured here; its
`EXPERIMENT` names the arms. `common` has what they share, `runner` trains them.
"""

import importlib

from train.config import ConfigError
from train.experiments.common import Experiment

__all__ = ["NAMES", "Experiment", "load"]

NAMES = (
    "figure2",
    "table1",
    "table2",
    "figure3",
    "figure4",
    "table3",
    "table4",
    "clothing1m",
    "figure5",
    "practice",
)
"""The names that `load` knows, the paper's in its order, and then our own."""


def load(name: str) -> Experiment:
    """The experiment of a name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in NAMES:
        raise ConfigError(f"unknown experiment {name!r}; known: {', '.join(NAMES)}")
    return importlib.import_module(f"train.experiments.{name}").EXPERIMENT
