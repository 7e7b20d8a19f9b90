"""One mini-batch gradient a call, for training loops that cannot be rewritten."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_bilevel import _inner_products, _past, _rule
from optax_bilevel._inner_products import Groups, PyTree


class BilevelMultiStepsState(NamedTuple):
    """State of `bilevel_multi_steps`.

    Attributes:
        mini_step: mini-batches seen of the current step, int32 [], 0 right after an update.
        gradient_step: updates applied so far, int32 [].
        inner_state: state of the wrapped optimizer.
        validation: Σ_{j∈V} g_j of the current step, as params, float32 or wider; with
            ``validation="past"`` Σ_i g_i over all its mini-batches, to enter the past.
        total: Σ_i ω_i g_i of the current step, as params, float32 or wider.
        dots, sq_norms: inner products of the current step, [groups, k], float32 or wider.
        weights: ω̂ of the last applied step, float32 [k] or [groups, k].
        cosine, negative, effective, dropped: of the last applied step; see `BilevelReweightState`.
        past: the average that validates, with ``validation="past"``; None otherwise.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    inner_state: Any
    validation: PyTree
    total: PyTree
    dots: jax.Array
    sq_norms: jax.Array
    weights: jax.Array
    cosine: jax.Array
    negative: jax.Array
    effective: jax.Array
    dropped: jax.Array
    past: _past.Past | None = None


def bilevel_multi_steps(
    opt: optax.GradientTransformation,
    every_k: int,
    lam: Any = 1.0,
    mu: Any = 0.01,
    *,
    num_validation: int = 1,
    solver: str = "diagonal",
    normalize: bool = True,
    nonnegative: bool = False,
    groups: Groups = None,
    validation: str = "batch",
    decay: Any = None,
    guard: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Like `optax.MultiSteps`, but every k-th call applies the reweighted gradient.

    The first `num_validation` of every k calls bring the validation gradients, the others the
    training gradients; the updates of all calls but the k-th are zero. The wrapped optimizer, its
    schedules included, advances once in k calls. Holds two gradient-sized buffers, whatever k is;
    with ``validation="past"``, where all k calls bring training gradients, three.

    Args:
        opt: the optimizer that gets the reweighted gradient.
        every_k: k, static, greater than `num_validation`; at least 1 with ``validation="past"``.
        lam, mu, num_validation, normalize, nonnegative, groups, validation, decay, guard: as in
            `bilevel_reweight`.
        solver: "diagonal" only; eq. (8) needs all gradients at once.

    Returns:
        A transformation for gradients shaped like the parameters. See `BilevelMultiStepsState`.

    Raises:
        ValueError: at construction for a hyper-parameter out of range, ``solver="exact"`` or
            every_k ≤ num_validation; at trace time for gradients not shaped like the parameters.

    Example:
        >>> import jax.numpy as jnp, optax, optax_bilevel
        >>> tx = optax_bilevel.bilevel_multi_steps(optax.sgd(1.0), every_k=3)
        >>> params = jnp.zeros(2)
        >>> state = tx.init(params)
        >>> for grad in ([1.0, 0.0], [1.0, 1.0], [0.0, 0.0]):
        ...     updates, state = tx.update(jnp.array(grad), state, params)
        ...     print(updates)
        [0. 0.]
        [0. 0.]
        [-1. -1.]
    """
    rule = _rule.Rule(
        lam, mu, num_validation, solver, normalize, nonnegative, validation, decay, guard
    )
    rule.require_streamable("bilevel_multi_steps", "use bilevel_reweight or bilevel_pmean for it")
    _inner_products.check_groups(groups)
    if every_k <= rule.held_out:
        raise ValueError(
            f"every_k = {every_k} with num_validation = {rule.held_out} leaves no mini-batch to "
            f"train on: every_k must be at least {rule.held_out + 1}"
        )
    inner = optax.with_extra_args_support(opt)

    def init_fn(params: PyTree) -> Any:
        _inner_products.check_masked(params, allow_masked=False)
        grouping = _inner_products.resolve_groups(params, groups)
        dtype = _inner_products.products_dtype(params)
        per_slot = jnp.zeros((grouping.num_groups, every_k), dtype)
        scalars = {
            "mini_step": jnp.zeros((), jnp.int32),
            "gradient_step": jnp.zeros((), jnp.int32),
            "dots": per_slot,
            "sq_norms": per_slot,
            "weights": grouping.present(per_slot).astype(jnp.float32),
            "cosine": jnp.zeros((), jnp.float32),
            "negative": jnp.zeros((), jnp.float32),
            "effective": jnp.zeros((), jnp.float32),
            "dropped": jnp.zeros((), jnp.int32),
        }
        scalars = {name: _inner_products.replicate_like(x, params) for name, x in scalars.items()}
        return BilevelMultiStepsState(
            inner_state=inner.init(params),
            validation=_inner_products.wide_zeros(params),
            total=_inner_products.wide_zeros(params),
            past=_past.init_past(params) if rule.from_past else None,
            **scalars,
        )

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        remedy = (
            "bilevel_multi_steps takes the gradient of one mini-batch a call; for k stacked "
            "gradients use bilevel_reweight"
        )
        _inner_products.check_like(updates, state.total, remedy)
        grouping = _inner_products.resolve_groups(updates, groups)
        if not jax.tree.leaves(updates):
            return updates, state
        stack = jax.tree.map(lambda g: g[None], updates)
        step = state.mini_step
        is_validation = step < rule.held_out
        past = state.past
        has_past = _past.has_past(past)

        def accumulated(old: jax.Array, new: jax.Array, active: jax.Array) -> jax.Array:
            # A window starts from zeros rather than from what the one before it left.
            return jnp.where(step == 0, 0, old) + jnp.where(active, new, 0)

        new_sq_norms = _inner_products.squared_norms(stack, grouping)
        if past is None:
            gradients = _inner_products.validation_gradient(stack, 1)
        else:
            gradients = _inner_products.finite_sum(stack, new_sq_norms, grouping)
        validation = jax.tree.map(
            lambda v, g: accumulated(v, g, is_validation | rule.from_past),
            state.validation,
            gradients,
        )
        against = validation if past is None else past.average
        new_dots = _inner_products.dots_with(stack, against, grouping)
        dots = jax.lax.dynamic_update_slice_in_dim(state.dots, new_dots, step, axis=1)
        sq_norms = jax.lax.dynamic_update_slice_in_dim(state.sq_norms, new_sq_norms, step, axis=1)
        omega = _rule.diagonal_weights(new_dots, new_sq_norms, rule, has_past)
        total = jax.tree.map(
            lambda t, part: accumulated(t, part, ~is_validation),
            state.total,
            _inner_products.weighted_sum(stack, omega, grouping),
        )

        def apply(_: None) -> tuple[PyTree, Any, jax.Array, _rule.Health, Any]:
            validation_sq_norm = _inner_products.squared_norm(against, grouping)
            products = _rule.Products(dots, sq_norms, validation_sq_norm)
            weights = _rule.weigh(products, rule, has_past)
            reweighted = _inner_products.scale_and_cast(total, weights.scale, grouping, updates)
            new_updates, inner_state = inner.update(
                reweighted, state.inner_state, params, **extra_args
            )
            values = grouping.present(weights.values).astype(jnp.float32)
            advanced = None
            if past is not None:
                advanced = _past.advance(past, validation, sq_norms, rule)
            return new_updates, inner_state, values, weights.health, advanced

        shapes = jax.eval_shape(apply, None)[0]

        def wait(_: None) -> tuple[PyTree, Any, jax.Array, _rule.Health, Any]:
            health = _rule.Health(state.cosine, state.negative, state.effective, state.dropped)
            nothing = jax.tree.map(_inner_products.zeros_of, shapes)
            return nothing, state.inner_state, state.weights, health, past

        is_last = step == every_k - 1
        new_updates, inner_state, weights, health, past = jax.lax.cond(is_last, apply, wait, None)
        return new_updates, BilevelMultiStepsState(
            mini_step=jnp.where(is_last, 0, step + 1),
            gradient_step=jnp.where(
                is_last, optax.safe_increment(state.gradient_step), state.gradient_step
            ),
            inner_state=inner_state,
            validation=validation,
            total=total,
            dots=dots,
            sq_norms=sq_norms,
            weights=weights,
            past=past,
            **health._asdict(),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
