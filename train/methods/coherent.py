"""Steps as long as fresh mini-batches agree with the steps before (`optax_bilevel.coherent_steps`).

The gradient is the mean of all k; what the optimizer makes of it is scaled. Not in the paper.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import optax_bilevel
from train import mesh
from train.mesh import Layout
from train.methods.bilevel import all_gradients, choose_form, chunk_size, on_each_device
from train.methods.types import Batch, Gradient, LossFn, Method, PyTree, Task

_LEARNS = 0.98  # of the loss of guessing
_LONG = 10_000  # steps; from there on those taken by chance add up (docs/past.md)


def make(config: Any, task: Task) -> Method:
    """Takes `past_decay` and the fields `coherence_…` from the config."""
    steps = config.epochs * task.steps_per_epoch
    chosen = {"decay": config.past_decay, "margin": config.coherence_margin}
    options = {"decay": 0.99, "margin": 1.0} if steps >= _LONG else {}
    options |= {name: value for name, value in chosen.items() if value is not None}
    # Of several labels the loss of guessing depends on how rare they are.
    warmup_loss = None if task.multi_label else _LEARNS * math.log(task.num_classes)
    # The optimizer is the trainer's own: this keeps the averages.
    rule = optax_bilevel.coherent_steps(
        optax.identity(),
        **options,
        coherence_decay=config.coherence_decay,
        gain=config.coherence_gain,
        warmup_steps=round(config.coherence_warmup * steps),
        warmup_loss=warmup_loss,
    )
    form, how = choose_form(config, task)
    mean_of = _FORMS[form] if task.layout is None else _FORMS_ON_MESH[form](task.layout)

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: Any) -> Gradient:
        (losses, aux), mean, coherence = mean_of(loss_fn, params, batches, state.direction)
        _, state = rule.update(mean, state, params, coherence=coherence, value=jnp.mean(losses))
        return Gradient(losses, aux, mean, None, state, state.step_size)

    margin = f", margin {options['margin']:g}" if options.get("margin") else ""
    how = f"the mean of {config.k} gradients, steps scaled{margin}, {how}"
    note = "with batch norm it learnt too little, or memorised (docs/past.md): see bilevel"
    return Method(gradient, how, init=rule.init, with_batch_norm=note)


MeanOf = Callable[[LossFn, PyTree, Batch, PyTree], tuple[Any, ...]]
"""``(loss_fn, params, batches, direction) -> ((losses, aux), mean, coherence)``."""


def _stacked(loss_fn: LossFn, params: PyTree, batches: Batch, direction: PyTree) -> tuple[Any, ...]:
    losses, aux, stack = all_gradients(loss_fn, params, batches)
    return (losses, aux), *optax_bilevel.mean_and_coherence(stack, direction)


def _streaming(
    loss_fn: LossFn, params: PyTree, batches: Batch, direction: PyTree
) -> tuple[Any, ...]:
    step = optax_bilevel.coherent_value_and_grad(loss_fn, has_aux=True, chunk_size=chunk_size())
    return step(params, batches, direction)


def _streaming_on_mesh(layout: Layout) -> MeanOf:
    """Whole mini-batches on each device: a mean, and three scalars."""

    def mean_of(
        loss_fn: LossFn, params: PyTree, batches: Batch, direction: PyTree
    ) -> tuple[Any, ...]:
        step = optax_bilevel.coherent_value_and_grad(
            loss_fn, has_aux=True, chunk_size=chunk_size(), axis_name=mesh.ALL
        )
        mapped = jax.shard_map(
            step,
            mesh=layout.mesh,
            in_specs=(P(), P(mesh.ALL), P()),
            out_specs=(P(mesh.ALL), P(), P()),
        )
        return mapped(params, batches, direction)

    return mean_of


def _collective(layout: Layout) -> MeanOf:
    """One mini-batch on each device, or a part of one: a mean, and three scalars."""

    def combine(grads: PyTree, direction: PyTree) -> tuple[Any, ...]:
        return optax_bilevel.mean_and_coherence(
            grads, direction, axis_name=mesh.BATCH, example_axis=mesh.EXAMPLE
        )

    def mean_of(
        loss_fn: LossFn, params: PyTree, batches: Batch, direction: PyTree
    ) -> tuple[Any, ...]:
        mapped = on_each_device(layout, loss_fn, combine, (P(),), (P(), P()))
        losses, aux, *mean_and_coherence = mapped(params, batches, direction)
        return (losses, aux), *mean_and_coherence

    return mean_of


_FORMS = {"streaming": _streaming, "stacked": _stacked}
_FORMS_ON_MESH = {"streaming": _streaming_on_mesh, "collective": _collective}
