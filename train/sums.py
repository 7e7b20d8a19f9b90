"""Figures of an epoch's steps, added up on the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from train import methods

PyTree = Any

SHARE_BINS = 5  # shares of noisy labels 0, 1/4, 1/2, 3/4, 1, rounded
OMEGA_BINS = 101
OMEGA_RANGE = 5.0  # ω̂·(k-1) from -5 to 5; a uniform weight is 1


class Sums(NamedTuple):
    """Running sums of an epoch, on the device; part of the checkpoint.

    Attributes:
        loss: sum of the mini-batches' losses; `losses` counts them.
        given, true: numbers of examples whose given, and whose true label was predicted.
        examples: number of examples seen.
        steps: number of steps.
        negative, effective: sums over steps of the share of negative weights and of 1/Σω̂².
        dropped: number of mini-batches whose loss was not finite.
        step_size, agreement: sums over steps of what `coherent` multiplied the optimizer's step by
            and of the agreement that it rests on; `excluded` counts the held-out examples that it
            left out because their loss was not finite.
        omega: histogram of ω̂·(k-1) by the share of noisy labels, [SHARE_BINS, OMEGA_BINS].
        omega_sum: sum of ω̂·(k-1) by the share of noisy labels, [SHARE_BINS].
    """

    loss: jax.Array
    losses: jax.Array
    given: jax.Array
    true: jax.Array
    examples: jax.Array
    steps: jax.Array
    negative: jax.Array
    effective: jax.Array
    dropped: jax.Array
    step_size: jax.Array
    agreement: jax.Array
    excluded: jax.Array
    omega: jax.Array
    omega_sum: jax.Array

    @classmethod
    def zeros(cls) -> "Sums":
        """Sums at the start of an epoch."""
        shapes = {"omega": (SHARE_BINS, OMEGA_BINS), "omega_sum": (SHARE_BINS,)}
        return cls(**{name: jnp.zeros(shapes.get(name, ())) for name in cls._fields})

    def add(
        self,
        given: jax.Array,
        true: jax.Array | None,
        done: methods.Gradient,
        num_validation: int,
        everywhere: Callable[[PyTree], PyTree],
    ) -> "Sums":
        """Adds a step.

        Args:
            given: labels, int32 [k, b] or [k, b, classes].
            true: likewise; None where nobody knows them.
            done: what the method made of the step.
            num_validation: how many of the k mini-batches are not trained on.
            everywhere: puts arrays whole on every device.
        """
        k, b = given.shape[:2]
        losses = done.losses
        logits = done.aux.logits.reshape(k * b, -1)
        finite = jnp.isfinite(losses)
        sums = self._replace(
            loss=self.loss + jnp.sum(jnp.where(finite, losses, 0)),
            losses=self.losses + jnp.sum(finite),
            given=self.given + _correct(logits, given),
            true=self.true if true is None else self.true + _correct(logits, true),
            examples=self.examples + k * b,
            steps=self.steps + 1,
            dropped=self.dropped + jnp.sum(~finite),
        )
        if done.weights is None:
            return sums
        wrong = jnp.zeros((k, b), bool)
        if true is not None:
            wrong = jnp.any((given != true).reshape(k, b, -1), axis=-1)
        # XLA's partitioner counts too often where indices of a scatter are shared unevenly.
        omega, share = everywhere((done.weights, jnp.mean(wrong, axis=1)))
        return sums._add_weights(omega[num_validation:], share[num_validation:])

    def _add_weights(self, omega: jax.Array, share: jax.Array) -> "Sums":
        l1, l2 = jnp.sum(jnp.abs(omega)), jnp.sum(jnp.square(omega))
        scaled = omega * len(omega)
        row = jnp.round(share * (SHARE_BINS - 1)).astype(jnp.int32)
        place = (scaled + OMEGA_RANGE) / (2 * OMEGA_RANGE) * OMEGA_BINS
        column = jnp.clip(jnp.floor(place), 0, OMEGA_BINS - 1).astype(jnp.int32)
        return self._replace(
            negative=self.negative + jnp.mean(omega < 0),
            effective=self.effective + jnp.where(l2 > 0, l1**2 / jnp.where(l2 > 0, l2, 1), 0),
            omega=self.omega.at[row, column].add(1),
            omega_sum=self.omega_sum.at[row].add(scaled),
        )

    def add_judgement(self, opt_state: Any) -> "Sums":
        """Adds how coherent steps judged a step, from the state that it left."""
        fresh = {n: optax.tree.get(opt_state, n) for n in ("step_size", "agreement", "excluded")}
        return self._replace(**{name: getattr(self, name) + x for name, x in fresh.items()})


def _correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """How many of the examples [n, classes] have their label [k, b] or [k, b, classes] on top."""
    top = jnp.argmax(logits, -1)
    if labels.ndim == 3:  # several labels: the top score is one of them
        one_hot = jax.nn.one_hot(top, logits.shape[-1], dtype=labels.dtype)
        return jnp.sum(one_hot * labels.reshape(logits.shape)).astype(jnp.float32)
    return jnp.sum(top == labels.reshape(-1)).astype(jnp.float32)


def figures(sums: Sums, *, true_known: bool, judged: bool) -> dict[str, Any]:
    """An epoch's line of them, in training mode: augmentation, dropout, batch statistics.

    Args:
        sums: of the epoch.
        true_known: whether true labels beside the given ones are known.
        judged: whether coherent steps judged the steps.
    """
    sums = jax.tree.map(np.asarray, jax.device_get(sums))
    line = {
        "loss": float(sums.loss / max(sums.losses, 1)),
        "running_given": float(sums.given / sums.examples),
        **({"running_true": float(sums.true / sums.examples)} if true_known else {}),
        "not_finite": int(sums.dropped),
    }
    if judged:
        line["step_size"] = float(sums.step_size / sums.steps)
        line["agreement"] = float(sums.agreement / sums.steps)
        line["excluded"] = int(sums.excluded)
    counts = sums.omega.sum(1)
    if not counts.any():  # a method that weighs nothing
        return line
    line["omega_negative"] = float(sums.negative / sums.steps)
    line["omega_effective"] = float(sums.effective / sums.steps)
    line["omega_mean"] = float(sums.omega_sum.sum() / counts.sum())
    if true_known:
        line["omega_by_share"] = [
            float(total / count) if count else None
            for total, count in zip(sums.omega_sum, counts, strict=True)
        ]
        line["omega_histogram"] = sums.omega.astype(int).tolist()
    return line
