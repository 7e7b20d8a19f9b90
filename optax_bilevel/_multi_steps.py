"""One mini-batch gradient a call, for training loops that cannot be rewritten."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_bilevel import _mesh, _rule, _tree, _validate
from optax_bilevel._tree import Groups, PyTree


class BilevelMultiStepsState(NamedTuple):
    r"""State of `bilevel_multi_steps`.

    Attributes:
        mini_step: mini-batches seen of the current step, int32 [], 0 right after an update.
        gradient_step: updates applied so far, int32 [].
        inner_state: state of the wrapped optimizer.
        validation: :math:`\sum_{j\in V} g_j` of the current step, as params, float32 or wider.
        total: :math:`\sum_i\omega_i g_i` of the current step, as params, float32 or wider.
        dots, sq_norms: inner products of the current step, [groups, k], float32 or wider.
        weights: ω̂ of the last applied step, float32 [k] or [groups, k].
        cosine, negative, effective, dropped: of the last applied step; see `BilevelReweightState`.
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


def bilevel_multi_steps(
    opt: optax.GradientTransformation,
    every_k: int,
    lam: ArrayLike = 1.0,
    mu: ArrayLike = 0.01,
    *,
    num_validation: int = 1,
    normalize: bool = True,
    nonnegative: bool = False,
    groups: Groups = None,
) -> optax.GradientTransformationExtraArgs:
    """Like `optax.MultiSteps`, but every k-th call applies the reweighted gradient of eq. (10).

    The first `num_validation` of every k calls bring the validation gradients, the others the
    training gradients; the updates of all calls but the k-th are zero. The wrapped optimizer, its
    schedules included, advances once in k calls. Holds two gradient-sized buffers, whatever k is.

    Args:
        opt: the optimizer that gets the reweighted gradient.
        every_k: k, static, greater than `num_validation`.
        lam, mu, num_validation, normalize, nonnegative, groups: as in `bilevel_reweight`.

    Returns:
        A transformation for gradients shaped like the parameters. See `BilevelMultiStepsState`.

    Raises:
        ValueError: at construction for a hyper-parameter out of range or every_k ≤ num_validation;
            in `init` for a leaf that is no floating-point array; at trace time for gradients not
            shaped like the parameters.

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
    rule = _validate.rule(lam, mu, num_validation, groups, "diagonal", normalize, nonnegative)
    _validate.at_least("every_k", every_k, 1)
    _validate.enough(f"every_k = {every_k} calls", every_k, num_validation)
    inner = optax.with_extra_args_support(opt)

    def init_fn(params: PyTree) -> Any:
        params = _tree.as_arrays(params)
        _validate.parameters(params)
        grouping = _tree.resolve_groups(params, groups)

        def per_slot(dtype: Any) -> jax.Array:
            return jnp.zeros((grouping.num_groups, every_k), dtype)

        def scalar(dtype: Any) -> jax.Array:
            return jnp.zeros((), dtype)

        dtype = _tree.products_dtype(params)
        scalars = {
            "mini_step": scalar(jnp.int32),
            "gradient_step": scalar(jnp.int32),
            "dots": per_slot(dtype),
            "sq_norms": per_slot(dtype),
            "weights": grouping.present(per_slot(jnp.float32)),
            "cosine": scalar(jnp.float32),
            "negative": scalar(jnp.float32),
            "effective": scalar(jnp.float32),
            "dropped": scalar(jnp.int32),
        }
        scalars = {name: _mesh.replicate_like(x, params) for name, x in scalars.items()}
        return BilevelMultiStepsState(
            inner_state=inner.init(params),
            validation=_tree.wide_zeros(params),
            total=_tree.wide_zeros(params),
            **scalars,
        )

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        updates = _tree.as_arrays(updates)
        _validate.one_gradient(
            updates,
            state.total,
            "bilevel_multi_steps takes the gradient of one mini-batch a call; for k stacked "
            "gradients use bilevel_reweight",
        )
        grouping = _tree.resolve_groups(updates, groups)
        if not jax.tree.leaves(updates):
            return updates, state
        stack = jax.tree.map(lambda g: g[None], updates)
        step = state.mini_step
        is_validation = step < num_validation

        def accumulated(old: PyTree, new: PyTree, active: jax.Array) -> PyTree:
            # A window starts from zeros rather than from what the one before it left.
            leaves = [
                jnp.where(step == 0, 0, a) + jnp.where(active, b, 0)
                for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
            ]
            return jax.tree.unflatten(jax.tree.structure(old), leaves)

        gradient = _tree.validation_gradient(stack, 1)
        validation = accumulated(state.validation, gradient, is_validation)
        new_dots = _tree.dots_with(stack, validation, grouping)
        new_sq_norms = _tree.squared_norms(stack, grouping)
        dots = jax.lax.dynamic_update_slice_in_dim(state.dots, new_dots, step, axis=1)
        sq_norms = jax.lax.dynamic_update_slice_in_dim(state.sq_norms, new_sq_norms, step, axis=1)
        omega = _rule.diagonal_weights(new_dots, new_sq_norms, rule)
        weighted = _tree.weighted_sum(stack, omega, grouping)
        total = accumulated(state.total, weighted, ~is_validation)

        def apply(_: None) -> tuple[PyTree, Any, jax.Array, _rule.Health]:
            validation_sq_norm = _tree.squared_norm(validation, grouping)
            weights = _rule.weigh(_rule.Products(dots, sq_norms, validation_sq_norm), rule)
            reweighted = jax.tree.unflatten(
                jax.tree.structure(updates),
                jax.tree.leaves(_tree.scale_and_cast(total, weights.scale, grouping, updates)),
            )
            new_updates, inner_state = inner.update(
                reweighted, state.inner_state, params, **extra_args
            )
            values = grouping.present(weights.values).astype(jnp.float32)
            return new_updates, inner_state, values, weights.health

        shapes = jax.eval_shape(apply, None)[0]

        def wait(_: None) -> tuple[PyTree, Any, jax.Array, _rule.Health]:
            health = _rule.Health(state.cosine, state.negative, state.effective, state.dropped)
            nothing = jax.tree.map(jnp.zeros_like, shapes)
            return nothing, state.inner_state, state.weights, health

        is_last = step == every_k - 1
        new_updates, inner_state, weights, health = jax.lax.cond(is_last, apply, wait, None)
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
            **health._asdict(),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
