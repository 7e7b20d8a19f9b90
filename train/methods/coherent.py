"""Steps as long as fresh mini-batches agree with the steps before (`optax_bilevel.coherent_steps`).

The gradient is the mean of all k; what the optimizer makes of it is scaled. Not in the paper.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import PartitionSpec as P

import optax_bilevel
from train import mesh
from train.mesh import Layout
from train.methods.bilevel import all_gradients, on_each_device
from train.methods.types import Batch, Gradient, LossFn, Method, PyTree, Task

LONG = 10_000  # steps; from there on those taken by chance add up (docs/past.md)


def make(config: Any, task: Task) -> Method:
    """Takes `past_decay` and the fields `coherence_…` from the config."""
    steps = config.epochs * task.steps_per_epoch
    decay, margin = (0.99, 1.0) if steps >= LONG else (0.97, 0.0)
    decay = decay if config.past_decay is None else config.past_decay
    margin = margin if config.coherence_margin is None else config.coherence_margin
    # The optimizer is the trainer's own: this keeps the averages.
    rule = optax_bilevel.coherent_steps(
        optax.identity(),
        decay=decay,
        coherence_decay=config.coherence_decay,
        gain=config.coherence_gain,
        margin=margin,
        warmup_steps=round(config.coherence_warmup * steps),
    )
    layout = task.layout
    # The compiler would send all k gradients of a stack that lies on several devices.
    if layout is None or layout.per_device > 1:
        mean_of = _stacked
    else:
        mean_of = _collective(layout)

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: Any) -> Gradient:
        losses, aux, mean, coherence = mean_of(loss_fn, params, batches, state.direction)
        _, state = rule.update(mean, state, params, coherence=coherence)
        return Gradient(losses, aux, mean, None, state, state.step_size)

    how = f"the mean of {config.k} gradients, steps scaled"
    return Method(gradient, f"{how}, margin {margin:g}" if margin else how, init=rule.init)


def _stacked(loss_fn: LossFn, params: PyTree, batches: Batch, direction: PyTree) -> Any:
    losses, aux, stack = all_gradients(loss_fn, params, batches)
    return losses, aux, *optax_bilevel.mean_and_coherence(stack, direction)


def _collective(layout: Layout) -> Callable[..., Any]:
    """One mini-batch on each device, or a part of one: a mean, and three scalars."""

    def combine(grads: PyTree, direction: PyTree) -> tuple[Any, ...]:
        grads = jax.lax.pmean(grads, mesh.EXAMPLE)
        return optax_bilevel.mean_and_coherence(grads, direction, axis_name=mesh.BATCH)

    def mean_of(loss_fn: LossFn, params: PyTree, batches: Batch, direction: PyTree) -> Any:
        mapped = on_each_device(layout, loss_fn, combine, (P(),), (P(), P()))
        return mapped(params, batches, direction)

    return mean_of
