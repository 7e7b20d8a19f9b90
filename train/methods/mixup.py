"""Mixup, with SGD or with the bilevel rule (Zhang et al., 2018).

"mixup: beyond empirical risk minimization", section 2: x̃ = λ x_i + (1 - λ) x_j and
ỹ = λ y_i + (1 - λ) y_j with λ ~ Beta(α, α); as cross-entropy is linear in the label, the loss of ỹ
is λ·loss(y_i) + (1 - λ)·loss(y_j). One λ for a mini-batch, whose examples are mixed with each
other, as in the comparison of table 3. `mixup` takes all examples of the step as one mini-batch.
With `bilevel_mixup` each of the k is mixed by itself, and the rule weighs their gradients; λ and
the partners come from the key of the dropout masks: with `dropout_masks` shared all k mini-batches
mix alike, so that with stratified sampling their mixed labels stay identical too.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from train import augment
from train.methods import bilevel, sgd
from train.methods.types import (
    Batch,
    Gradient,
    GradientFn,
    LossFn,
    Method,
    PyTree,
    Task,
    cross_entropy,
)


class Mixed(NamedTuple):
    """Labels of a mixed mini-batch.

    Attributes:
        given: of the images, [b] or [b, classes].
        partners: of what they are mixed with, likewise.
        lam: λ, float32 [b], all equal.
    """

    given: jax.Array
    partners: jax.Array
    lam: jax.Array


def make(config: Any, task: Task) -> Method:
    """Takes `mixup_alpha` from the config."""
    del task
    mixed = _with_mixup(sgd.gradient, config.mixup_alpha)

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: PyTree) -> Gradient:
        images, labels = jax.tree.map(
            lambda x: x.reshape(1, -1, *x.shape[2:]), (batches.images, batches.labels)
        )
        return mixed(loss_fn, params, Batch(images, labels, batches.key[:1]), state)

    return Method(gradient, f"mixup with α = {config.mixup_alpha:g}, {sgd.HOW}")


def make_bilevel(config: Any, task: Task) -> Method:
    """Mixup inside each mini-batch, then eq. (10)."""
    rule = bilevel.make(config, task)
    return dataclasses.replace(
        rule,
        gradient=_with_mixup(rule.gradient, config.mixup_alpha),
        how=f"mixup with α = {config.mixup_alpha:g}, {rule.how}",
    )


def _with_mixup(gradient: GradientFn, alpha: float) -> GradientFn:
    """The gradient of mini-batches that are mixed each by itself."""

    def mix(batch: Batch) -> Batch:
        key = jax.random.fold_in(batch.key, 1)  # the key itself draws the dropout masks
        images, partners, lam = augment.mixup(key, batch.images, batch.labels, alpha)
        lam = jnp.broadcast_to(lam, len(images))
        return batch._replace(images=images, labels=Mixed(batch.labels, partners, lam))

    def criterion(logits: jax.Array, labels: Mixed) -> jax.Array:
        given, partners, lam = labels
        return lam * cross_entropy(logits, given) + (1 - lam) * cross_entropy(logits, partners)

    def with_mixup(loss_fn: LossFn, params: PyTree, batches: Batch, state: PyTree) -> Gradient:
        mixed = functools.partial(loss_fn, criterion=criterion)
        copies = batches.copies
        batches = jax.vmap(mix)(batches._replace(copies=None))
        if copies is not None:
            batches = batches._replace(copies=jax.vmap(mix)(copies))
        return gradient(mixed, params, batches, state)

    return with_mixup
