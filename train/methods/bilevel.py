"""The paper's rule, eq. (10), or eq. (8) for `bilevel_exact`, in any of its four forms."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import models
import optax_bilevel
from train.methods.types import Batch, Gradient, GradientFn, LossFn, Method, PyTree, Task

EXACT_FORMS = ("stacked", "collective")


def make(config: Any, task: Task) -> Method:
    """Eq. (10), streaming unless the config says otherwise: the least memory."""
    del task
    return _make(config, "diagonal", "streaming" if config.form == "auto" else config.form)


def make_exact(config: Any, task: Task) -> Method:
    """Eq. (8), which needs all gradients: stacked unless the config says otherwise."""
    del task
    return _make(config, "exact", "stacked" if config.form == "auto" else config.form)


def _make(config: Any, solver: str, form: str) -> Method:
    options = {
        "lam": config.lam,
        "mu": config.mu,
        "num_validation": config.num_validation,
        "solver": solver,
        "normalize": config.normalize,
        "nonnegative": config.nonnegative,
        "groups": {"all": None, "leaf": "leaf", "layer": models.layer_labels}[config.groups],
    }
    chosen = " (chosen for this method)" if config.form == "auto" else ""
    how = f"{form} form{chosen} on {jax.default_backend()}"
    return Method(_FORMS[form](config.k, options), how)


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
        losses, aux, stack = _all_gradients(loss_fn, params, batches)
        grads, rule_state = rule.update(stack, rule.init(params), params)
        weights = optax.tree.get(rule_state, "weights")
        return Gradient(losses, aux, grads, _per_mini_batch(weights), state)

    return gradient


def _multi_steps(k: int, options: dict[str, Any]) -> GradientFn:
    rule = optax_bilevel.bilevel_multi_steps(optax.identity(), k, **options)

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: PyTree) -> Gradient:
        losses, aux, stack = _all_gradients(loss_fn, params, batches)

        def call(rule_state: Any, grads: PyTree) -> tuple[Any, PyTree]:
            updates, rule_state = rule.update(grads, rule_state, params)
            return rule_state, updates

        rule_state, updates = jax.lax.scan(call, rule.init(params), stack)
        grads = jax.tree.map(lambda x: x[-1], updates)
        return Gradient(losses, aux, grads, _per_mini_batch(rule_state.weights), state)

    return gradient


def _collective(k: int, options: dict[str, Any]) -> GradientFn:
    if jax.device_count() != k:
        raise ValueError(
            f"the collective form puts one mini-batch on each device: k = {k}, but there are "
            f"{jax.device_count()} devices; take k = {jax.device_count()} or another form"
        )
    mesh = jax.make_mesh((k,), ("batch",), axis_types=(AxisType.Auto,))

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: PyTree) -> Gradient:
        def on_device(params: PyTree, batches: Batch) -> tuple[Any, Any, PyTree, jax.Array]:
            params = jax.lax.pcast(params, "batch", to="varying")
            batch = jax.tree.map(lambda x: x[0], batches)
            (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
            grads, weights = optax_bilevel.bilevel_pmean(
                grads, "batch", **options, return_weights=True
            )
            return loss[None], jax.tree.map(lambda x: x[None], aux), grads, weights

        specs = (P("batch"), P("batch"), P(), P())
        mapped = jax.shard_map(on_device, mesh=mesh, in_specs=(P(), P("batch")), out_specs=specs)
        losses, aux, grads, weights = mapped(params, batches)
        return Gradient(losses, aux, grads, _per_mini_batch(weights), state)

    return gradient


_FORMS = {
    "streaming": _streaming,
    "stacked": _stacked,
    "multi_steps": _multi_steps,
    "collective": _collective,
}


def _all_gradients(loss_fn: LossFn, params: PyTree, batches: Batch) -> tuple[Any, Any, PyTree]:
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (losses, aux), stack = jax.vmap(value_and_grad, in_axes=(None, 0))(params, batches)
    return losses, aux, stack


def _per_mini_batch(weights: jax.Array) -> jax.Array:
    """[k], averaged over groups where there are several."""
    return jnp.mean(weights, axis=0) if weights.ndim == 2 else weights
