"""Networks that do not memorise wrong labels: two rules that cross-validate every training step.

The paper's (Jenni & Favaro, *Deep Bilevel Learning*, ECCV 2018) weighs mini-batches by their
agreement with a validation mini-batch; `coherent_steps` scales any optimizer's steps by how far
held-out examples gain from them.
"""

from optax_bilevel._alignment import example_alignment
from optax_bilevel._coherent import CoherentStepsState, coherent_steps
from optax_bilevel._multi_steps import BilevelMultiStepsState, bilevel_multi_steps
from optax_bilevel._pmean import bilevel_pmean, bilevel_pmean_and_weights
from optax_bilevel._reweight import BilevelReweightState, bilevel_reweight, bilevel_weights
from optax_bilevel._sampling import stratified_batches
from optax_bilevel._value_and_grad import bilevel_value_and_grad

__all__ = [
    "BilevelMultiStepsState",
    "BilevelReweightState",
    "CoherentStepsState",
    "bilevel_multi_steps",
    "bilevel_pmean",
    "bilevel_pmean_and_weights",
    "bilevel_reweight",
    "bilevel_value_and_grad",
    "bilevel_weights",
    "coherent_steps",
    "example_alignment",
    "stratified_batches",
]
__version__ = "0.1.0"
