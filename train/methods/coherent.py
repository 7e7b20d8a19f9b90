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

_LONG = 10_000  # steps; from there on those taken by chance add up (docs/past.md)


def make(config: Any, task: Task) -> Method:
    """Takes `past_decay` and the fields `coherence_…` from the config."""
    steps = config.epochs * task.steps_per_epoch
    chosen = {"decay": config.past_decay, "margin": config.coherence_margin}
    options = {"decay": 0.99, "margin": 1.0} if steps >= _LONG else {}
    options |= {name: value for name, value in chosen.items() if value is not None}
    # The optimizer is the trainer's own: this keeps the averages.
    rule = optax_bilevel.coherent_steps(
        optax.identity(),
        **options,
        coherence_decay=config.coherence_decay,
        gain=config.coherence_gain,
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
    if margin := options.get("margin"):
        how += f", margin {margin:g}"
    note = "with batch norm it learnt too little, or memorised (docs/past.md): see bilevel"
    return Method(gradient, how, init=rule.init, with_batch_norm=note)


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
