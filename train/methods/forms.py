"""The forms of the rule: ways to one reweighted gradient, on one device or on a mesh.

They differ in which gradients are in memory at a time and in what travels between devices, not in
what they compute; see docs/forms.md.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import optax_bilevel
from train import mesh
from train.mesh import Layout
from train.methods.types import Aux, Batch, Gradient, GradientFn, LossFn, PyTree, Task

EXACT = ("stacked", "collective")
"""The forms that have all gradients, which eq. (8) needs."""


# ------------------------------------------------------------------------------- the choice


def choose(config: Any, task: Task, solver: str = "diagonal") -> tuple[str, str]:
    """The form that a config asks for or, where it says auto, the quickest for its network.

    Returns:
        the form, and a line about it.

    Raises:
        ValueError: for a form that does not go with the devices.
    """
    form, layout = config.form, task.layout
    if form == "auto" and layout is not None:
        alone = layout.per_device == 1 or solver == "exact"
        form = "collective" if alone else "streaming"
    elif form == "auto":
        form = "stacked" if solver == "exact" or _stack_is_quick(task, config.k) else "streaming"
    chosen = " (chosen)" if config.form == "auto" else ""
    how = f"{form} form{chosen} on {jax.default_backend()}"
    if layout is not None:
        _check_on_mesh(form, layout, config.k, solver)
        return form, f"{how}: {layout.describe()}"
    if form == "collective":
        raise ValueError(
            "the collective form puts one mini-batch on each device, and there is one device; "
            f"take another form, or k = {config.k} devices"
        )
    return form, how


def _stack_is_quick(task: Task, k: int) -> bool:
    """Whether k gradients on one device are best stacked: docs/scaling.md."""
    mib = k * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(task.parameters)) / 2**20
    # One mini-batch of such a network does not fill a GPU.
    return jax.default_backend() == "gpu" and mib <= 64


def _check_on_mesh(form: str, layout: Layout, k: int, solver: str) -> None:
    count = layout.mesh.size
    if form not in ON_MESH:
        raise ValueError(
            f"form {form} is for one device, and there are {count}; "
            f"known on several: auto, {', '.join(ON_MESH)}"
        )
    if form == "collective" and layout.per_device > 1:
        why = ", and eq. (8) needs all gradients at once" if solver == "exact" else ""
        raise ValueError(
            f"the collective form has at most one mini-batch on each device{why}: k = {k}, but "
            f"there are {count} devices; take k = {count} or a divisor of it, or k devices"
            + ("" if why else ", or form streaming")
        )
    if form == "streaming" and layout.spread > 1:
        raise ValueError(
            f"form streaming has whole mini-batches on each of the {count} devices: k must be a "
            f"multiple of {count}, got {k}; or take form collective"
        )


# ---------------------------------------------------------------------------- on one device


def _streaming(k: int, options: dict[str, Any]) -> GradientFn:
    del k

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: PyTree) -> Gradient:
        step = optax_bilevel.bilevel_value_and_grad(loss_fn, has_aux=True, **options)
        (losses, aux), grads, weights = step(params, batches)
        return Gradient(losses, aux, grads, _per_mini_batch(weights), state)

    return gradient


def _stacked(k: int, options: dict[str, Any]) -> GradientFn:
    rule = optax_bilevel.bilevel_reweight(**options, num_batches=k)

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: PyTree) -> Gradient:
        losses, aux, stack = all_gradients(loss_fn, params, batches)
        rule_state: Any
        grads, rule_state = rule.update(stack, rule.init(params), params)
        return Gradient(losses, aux, grads, _per_mini_batch(rule_state.weights), state)

    return gradient


def _multi_steps(k: int, options: dict[str, Any]) -> GradientFn:
    rule = optax_bilevel.bilevel_multi_steps(optax.identity(), k, **options)

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: PyTree) -> Gradient:
        losses, aux, stack = all_gradients(loss_fn, params, batches)

        def call(rule_state: Any, grads: PyTree) -> tuple[Any, PyTree]:
            updates, rule_state = rule.update(grads, rule_state, params)
            return rule_state, updates

        rule_state: Any
        rule_state, updates = jax.lax.scan(call, rule.init(params), stack)
        grads = jax.tree.map(lambda x: x[-1], updates)
        return Gradient(losses, aux, grads, _per_mini_batch(rule_state.weights), state)

    return gradient


ON_ONE_DEVICE: dict[str, Callable[[int, dict[str, Any]], GradientFn]] = {
    "streaming": _streaming,
    "stacked": _stacked,
    "multi_steps": _multi_steps,
}


def all_gradients(loss_fn: LossFn, params: PyTree, batches: Batch) -> tuple[Any, Any, PyTree]:
    """Losses [k], what comes beside them, and gradients of all mini-batches, leaves [k, ...]."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if jax.default_backend() == "cpu" and any(x.ndim > 2 for x in jax.tree.leaves(params)):
        # vmap makes weight gradients of convolutions grouped convolutions, which are slow there.
        each = [
            value_and_grad(params, jax.tree.map(lambda x, i=i: x[i], batches))
            for i in range(batches.images.shape[0])
        ]
        (losses, aux), stack = jax.tree.map(lambda *x: jnp.stack(x), *each)
    else:
        (losses, aux), stack = jax.vmap(value_and_grad, in_axes=(None, 0))(params, batches)
    return losses, aux, stack


# -------------------------------------------------------------------------------- on a mesh


def _streaming_on_mesh(layout: Layout, options: dict[str, Any]) -> GradientFn:
    """Whole mini-batches on each device, several as a rule."""

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: PyTree) -> Gradient:
        step = optax_bilevel.bilevel_value_and_grad(
            loss_fn, has_aux=True, axis_name=mesh.ALL, **options
        )

        def on_device(params: PyTree, validation: Batch, own: Batch) -> tuple[Any, ...]:
            both = jax.tree.map(lambda v, x: jnp.concatenate([v, x]), validation, own)
            return step(params, both)

        mapped = jax.shard_map(
            on_device,
            mesh=layout.mesh,
            in_specs=(P(), P(), P(mesh.ALL)),
            out_specs=(P(mesh.ALL), P(), P()),
        )
        own = batches._replace(copies=None)
        (losses, aux), grads, weights = mapped(params, batches.copies, own)
        return Gradient(losses, aux, grads, _per_mini_batch(weights), state)

    return gradient


def _collective(layout: Layout, options: dict[str, Any]) -> GradientFn:
    """One mini-batch on each device, or a part of one."""

    def combine(grads: PyTree) -> tuple[Any, ...]:
        return optax_bilevel.bilevel_pmean_and_weights(
            grads, mesh.BATCH, **options, example_axis=mesh.EXAMPLE
        )

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: PyTree) -> Gradient:
        mapped = on_each_device(layout, loss_fn, combine, (), (P(), P()))
        losses, aux, grads, weights = mapped(params, batches)
        return Gradient(losses, aux, grads, _per_mini_batch(weights), state)

    return gradient


ON_MESH: dict[str, Callable[[Layout, dict[str, Any]], GradientFn]] = {
    "streaming": _streaming_on_mesh,
    "collective": _collective,
}


def on_each_device(
    layout: Layout,
    loss_fn: LossFn,
    combine: Callable[..., tuple[Any, ...]],
    in_specs: tuple[Any, ...],
    out_specs: tuple[Any, ...],
) -> Callable[..., Any]:
    """Maps over devices that have one mini-batch each, or a part of one.

    Args:
        layout: of the mini-batches.
        loss_fn: of a mini-batch.
        combine: ``(grads, *more) -> results`` with the gradient of the device's own examples.
        in_specs, out_specs: where `more` and `results` lie.

    Returns:
        ``(params, batches, *more) -> (losses, aux, *results)``, losses and aux of all k.
    """

    def on_device(params: PyTree, batches: Batch, *more: Any) -> tuple[Any, ...]:
        params = jax.lax.pcast(params, mesh.ALL, to="varying")
        batch = jax.tree.map(lambda x: x[0], batches)
        if layout.spread > 1:  # or the parts of a mini-batch would drop the same units
            part = jax.lax.axis_index(mesh.EXAMPLE)
            batch = batch._replace(key=jax.random.fold_in(batch.key, part))
        (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        results = combine(grads, *more)
        # Of the whole mini-batch already; this says so.
        loss, stats = jax.lax.pmean((loss, aux.batch_stats), mesh.EXAMPLE)
        loss, aux = jax.tree.map(lambda x: x[None], (loss, aux._replace(batch_stats=stats)))
        return loss, aux, *results

    examples: Any = P(mesh.BATCH, mesh.EXAMPLE)
    each: Any = P(mesh.BATCH)
    return jax.shard_map(
        on_device,
        mesh=layout.mesh,
        in_specs=(P(), Batch(examples, examples, each), *in_specs),
        out_specs=(each, Aux(examples, each, each), *out_specs),
    )


def _per_mini_batch(weights: jax.Array) -> jax.Array:
    """[k], averaged over groups where there are several."""
    return jnp.mean(weights, axis=0) if weights.ndim == 2 else weights
