"""MentorNet's predefined curriculum, MentorNet PD (Jiang et al., 2018).

"MentorNet: learning data-driven curriculum for very deep neural networks on corrupted labels".
The network of that name learns to reproduce the curriculum, which has a closed form; here the
closed form itself weighs the examples. The loss is 1/n Σ_i v_i ℓ_i, with weights that are constants
to the gradient and depend on the example's loss ℓ_i and on a moving average of percentiles::

    ℓ_p ← 0.9 ℓ_p + 0.1 · percentile(ℓ of the step, p), from 0

    first 19% of the steps:  v_i = 1                                     (burn-in)
    until 90%:               v_i = 1 where ℓ_i ≤ ℓ_p, and 0 elsewhere    (self-paced, λ1 = 0)
    after:                   v_i = min(max(1 - (ℓ_i - ℓ_p) / λ1, 0), 1)  (linear, λ1 = 1)

These are the two cases of the minimiser of Σ_i v_i ℓ_i + Σ_i (λ1 v_i² / 2 - (λ1 + λ2) v_i) over
v in [0, 1], λ2 = ℓ_p, and the times at which the authors' released code goes from one to the next
(`vstar_mentornet_pd`). p is `loss_percentile`, 75 as in the released commands for 40% noise. 0.9 is
the default of the released function; the script that calls it has 0.5. Not here: MentorNet DD,
which learns from clean labels, and the random dropping of examples on top.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from train.methods import sgd
from train.methods.types import Batch, Gradient, LossFn, Method, PyTree, Task, cross_entropy

_DECAY = 0.9
_BURN_IN, _LINEAR = 19, 90  # % of the steps
_LAMBDA_1 = 1.0


class Curriculum(NamedTuple):
    """The state.

    Attributes:
        step: steps done, int32 [].
        percentile: ℓ_p, float32 [].
    """

    step: jax.Array
    percentile: jax.Array


def make(config: Any, task: Task) -> Method:
    """Takes `loss_percentile` from the config, and the number of steps from it and the task."""
    num_steps = config.epochs * task.steps_per_epoch

    def advance(state: Curriculum, losses: jax.Array) -> Curriculum:
        percentile = jnp.percentile(losses, config.loss_percentile)
        average = _DECAY * state.percentile + (1 - _DECAY) * percentile
        return Curriculum(state.step + 1, average)

    def weights(state: Curriculum, losses: jax.Array) -> jax.Array:
        """v, [n]."""
        progress = state.step / num_steps * 100
        excess = losses - advance(state, losses).percentile
        self_paced = (excess <= 0).astype(losses.dtype)
        linear = jnp.clip(1 - excess / _LAMBDA_1, 0, 1)
        return jnp.where(
            progress < _BURN_IN, 1.0, jnp.where(progress < _LINEAR, self_paced, linear)
        )

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: Curriculum) -> Gradient:
        def criterion(logits: jax.Array, labels: jax.Array) -> jax.Array:
            losses = cross_entropy(logits, labels)
            return weights(state, jax.lax.stop_gradient(losses)) * losses

        done = sgd.gradient(loss_fn, params, batches, criterion=criterion)
        losses = cross_entropy(done.aux.logits[0], batches.labels.reshape(-1))
        return done._replace(state=advance(state, losses))

    def init(params: PyTree) -> Curriculum:
        del params
        return Curriculum(jnp.zeros((), jnp.int32), jnp.zeros(()))

    how = f"examples weighed by percentile {config.loss_percentile:g} of the losses, {sgd.HOW}"
    return Method(gradient, how, init)
