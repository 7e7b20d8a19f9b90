"""The paper's rule, eq. (10), or eq. (8) for `bilevel_exact`, in any of its four forms.

And `past`, which is not the paper's: eq. (10) with an average of earlier steps' mean gradients in
place of the validation mini-batches, so that all k train. Its state is (average,), theirs ().
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import models
import optax_bilevel
from train import mesh
from train.mesh import Layout
from train.methods.types import Aux, Batch, Gradient, GradientFn, LossFn, Method, PyTree, Task

EXACT_FORMS = ("stacked", "collective")


def make(config: Any, task: Task) -> Method:
    """Eq. (10)."""
    return _make(config, task, "diagonal")


def make_exact(config: Any, task: Task) -> Method:
    """Eq. (8), which needs all gradients."""
    return _make(config, task, "exact")


def make_past(config: Any, task: Task) -> Method:
    """Eq. (10) validated by the past."""
    past = {"validation": "past", "decay": config.past_decay}
    return _make(config, task, "diagonal", **past)


def choose_form(config: Any, task: Task, solver: str = "diagonal") -> tuple[str, str]:
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
    """Whether k gradients on one device are best stacked: docs/benchmarks.md."""
    mib = k * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(task.parameters)) / 2**20
    # One mini-batch of such a network does not fill a GPU.
    return jax.default_backend() == "gpu" and mib <= 64


def chunk_size() -> int | None:
    """How many mini-batches streaming takes at a time: docs/benchmarks.md."""
    return 4 if jax.default_backend() == "gpu" else None


def _convolves(params: PyTree) -> bool:
    return any(x.ndim > 2 for x in jax.tree.leaves(params))


def _make(config: Any, task: Task, solver: str, **past: Any) -> Method:
    options = {
        "lam": config.lam,
        "mu": config.mu,
        "num_validation": config.num_validation,
        "solver": solver,
        "normalize": config.normalize,
        "nonnegative": config.nonnegative,
        "groups": {"all": None, "leaf": "leaf", "layer": models.layer_labels}[config.groups],
        **past,
    }
    form, how = choose_form(config, task, solver)
    state: dict[str, Any] = {"init": _init} if past else {}
    if (layout := task.layout) is None:
        return Method(_FORMS[form](config.k, options), how, **state)
    if past and form == "collective":  # each device keeps the part of the average that it adds up
        init = functools.partial(_init, num_devices=layout.mesh.size)
        state = {"init": init, "spec": (_ROWS,)}
    # To send them round would cost as much as a tenth of a gradient.
    copies = options["num_validation"] if form == "streaming" and not past else 0
    return Method(_FORMS_ON_MESH[form](layout, options), how, copies=copies, **state)


_ROWS: Any = optax_bilevel.Past(P(mesh.ALL), cast(Any, P()))


def _init(params: PyTree, num_devices: int | None = None) -> PyTree:
    return (optax_bilevel.init_past(params, num_devices=num_devices),)


def _check_on_mesh(form: str, layout: Layout, k: int, solver: str) -> None:
    count = layout.mesh.size
    if form not in _FORMS_ON_MESH:
        raise ValueError(
            f"form {form} is for one device, and there are {count}; "
            f"known on several: auto, {', '.join(_FORMS_ON_MESH)}"
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


def _streaming(k: int, options: dict[str, Any]) -> GradientFn:
    del k

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: PyTree) -> Gradient:
        step = optax_bilevel.bilevel_value_and_grad(
            loss_fn, has_aux=True, chunk_size=chunk_size(), **options
        )
        (losses, aux), grads, weights, *state = step(params, batches, *state)
        return Gradient(losses, aux, grads, _per_mini_batch(weights), tuple(state))

    return gradient


def _stacked(k: int, options: dict[str, Any]) -> GradientFn:
    rule = optax_bilevel.bilevel_reweight(**options, num_batches=k)

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: PyTree) -> Gradient:
        losses, aux, stack = all_gradients(loss_fn, params, batches)
        rule_state: Any = _with_past(rule.init(params), state)
        grads, rule_state = rule.update(stack, rule_state, params)
        weights = _per_mini_batch(rule_state.weights)
        return Gradient(losses, aux, grads, weights, _past_of(rule_state))

    return gradient


def _multi_steps(k: int, options: dict[str, Any]) -> GradientFn:
    rule = optax_bilevel.bilevel_multi_steps(optax.identity(), k, **options)

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: PyTree) -> Gradient:
        losses, aux, stack = all_gradients(loss_fn, params, batches)

        def call(rule_state: Any, grads: PyTree) -> tuple[Any, PyTree]:
            updates, rule_state = rule.update(grads, rule_state, params)
            return rule_state, updates

        rule_state = _with_past(rule.init(params), state)
        rule_state, updates = jax.lax.scan(call, rule_state, stack)
        grads = jax.tree.map(lambda x: x[-1], updates)
        weights = _per_mini_batch(rule_state.weights)
        return Gradient(losses, aux, grads, weights, _past_of(rule_state))

    return gradient


def _collective(layout: Layout, options: dict[str, Any]) -> GradientFn:
    """One mini-batch on each device, or a part of one."""

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: PyTree) -> Gradient:
        def combine(grads: PyTree, *rows: Any) -> tuple[Any, ...]:
            return optax_bilevel.bilevel_pmean(
                grads,
                mesh.BATCH,
                **options,
                past=rows[0] if rows else None,
                example_axis=mesh.EXAMPLE,
                return_weights=True,
            )

        rows = (_ROWS,) * len(state)
        mapped = on_each_device(layout, loss_fn, combine, rows, (P(), P(), *rows))
        losses, aux, grads, weights, *state = mapped(params, batches, *state)
        return Gradient(losses, aux, grads, _per_mini_batch(weights), tuple(state))

    return gradient


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


def _streaming_on_mesh(layout: Layout, options: dict[str, Any]) -> GradientFn:
    """Whole mini-batches on each device, several as a rule."""

    def gradient(loss_fn: LossFn, params: PyTree, batches: Batch, state: PyTree) -> Gradient:
        step = optax_bilevel.bilevel_value_and_grad(
            loss_fn, has_aux=True, chunk_size=chunk_size(), axis_name=mesh.ALL, **options
        )

        def on_device(
            params: PyTree, validation: Batch | None, own: Batch, *past: Any
        ) -> tuple[Any, ...]:
            if validation is not None:
                own = jax.tree.map(lambda v, x: jnp.concatenate([v, x]), validation, own)
            return step(params, own, *past)

        past = (P(),) * len(state)
        mapped = jax.shard_map(
            on_device,
            mesh=layout.mesh,
            in_specs=(P(), P(), P(mesh.ALL), *past),
            out_specs=(P(mesh.ALL), P(), P(), *past),
        )
        own = batches._replace(copies=None)
        (losses, aux), grads, weights, *state = mapped(params, batches.copies, own, *state)
        return Gradient(losses, aux, grads, _per_mini_batch(weights), tuple(state))

    return gradient


_FORMS = {
    "streaming": _streaming,
    "stacked": _stacked,
    "multi_steps": _multi_steps,
}
_FORMS_ON_MESH = {"streaming": _streaming_on_mesh, "collective": _collective}


def _with_past(rule_state: Any, state: PyTree) -> Any:
    """The fresh state of a rule with the past in it, if there is one: `state` is (past,) or ()."""
    return rule_state._replace(past=state[0]) if state else rule_state


def _past_of(rule_state: Any) -> PyTree:
    return () if rule_state.past is None else (rule_state.past,)


def all_gradients(loss_fn: LossFn, params: PyTree, batches: Batch) -> tuple[Any, Any, PyTree]:
    """Losses [k], what comes beside them, and gradients of all mini-batches, leaves [k, ...]."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if jax.default_backend() == "cpu" and _convolves(params):
        # vmap makes their weight gradients grouped convolutions, which are slow there.
        each = [
            value_and_grad(params, jax.tree.map(lambda x, i=i: x[i], batches))
            for i in range(batches.images.shape[0])
        ]
        (losses, aux), stack = jax.tree.map(lambda *x: jnp.stack(x), *each)
    else:
        (losses, aux), stack = jax.vmap(value_and_grad, in_axes=(None, 0))(params, batches)
    return losses, aux, stack


def _per_mini_batch(weights: jax.Array) -> jax.Array:
    """[k], averaged over groups where there are several."""
    return jnp.mean(weights, axis=0) if weights.ndim == 2 else weights
