"""Bilevel mini-batch reweighting for optax (Jenni & Favaro, *Deep Bilevel Learning*, ECCV 2018)."""

from optax_bilevel._alignment import example_alignment
from optax_bilevel._coherence import (
    CoherentStepsState,
    coherent_steps,
    coherent_value_and_grad,
    mean_and_coherence,
)
from optax_bilevel._collective import bilevel_pmean
from optax_bilevel._multi_steps import BilevelMultiStepsState, bilevel_multi_steps
from optax_bilevel._past import Past, init_past
from optax_bilevel._reweight import BilevelReweightState, bilevel_reweight, bilevel_weights
from optax_bilevel._streaming import bilevel_value_and_grad

__all__ = [
    "BilevelMultiStepsState",
    "BilevelReweightState",
    "CoherentStepsState",
    "Past",
    "bilevel_multi_steps",
    "bilevel_pmean",
    "bilevel_reweight",
    "bilevel_value_and_grad",
    "bilevel_weights",
    "coherent_steps",
    "coherent_value_and_grad",
    "example_alignment",
    "init_past",
    "mean_and_coherence",
]
__version__ = "0.1.0"
