"""The stacked form: k gradients along a leading axis in, one reweighted update out.

Jenni & Favaro, *Deep Bilevel Learning*, ECCV 2018, eqs. (8), (10) and (11).
"""

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_bilevel import _inner_products, _past, _rule
from optax_bilevel._inner_products import Groups, PyTree


class BilevelReweightState(NamedTuple):
    """State of `bilevel_reweight`: a step counter and the health of the last step.

    Read a field out of a chain's state with ``optax.tree.get(state, "cosine")``.

    Attributes:
        count: number of updates so far, int32 [].
        cosine: mean cosine of the training mini-batches' gradients with the validation gradient,
            float32 []; near zero when nothing generalises from one mini-batch to the next.
        negative: share of training mini-batches with a negative weight, float32 [].
        effective: effective number of mini-batches 1/Σω̂², float32 []; 0 without an update.
        dropped: number of the k mini-batches left out of this step for a NaN or an Inf, int32 [].
        weights: ω̂, float32 [k] (validation slots 0), or [groups, k]; None unless `num_batches`
            was given.
        past: the average that validates, with ``validation="past"``; None otherwise.
    """

    count: Any  # jax.Array; the name hides tuple.count, as in every optax state
    cosine: jax.Array
    negative: jax.Array
    effective: jax.Array
    dropped: jax.Array
    weights: jax.Array | None
    past: _past.Past | None = None


def bilevel_reweight(
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
    num_batches: int | None = None,
    allow_masked: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces k stacked mini-batch gradients by one, weighted by agreement with validation.

    The first `num_validation` of the k mini-batches are the validation set V, the others the
    training set T. With :math:`g_i = \nabla\ell_i(\theta)`, eq. (10) gives

    .. math:: \omega_i = \frac{\sum_{j\in V}\langle g_j, g_i\rangle}{|g_i|^2/\hat\lambda + \hat\mu},
        \qquad \hat\omega = \omega / |\omega|_1, \qquad
        \text{update} = \sum_{i\in T}\hat\omega_i\, g_i.

    Weights may be negative; the validation gradient itself is not part of the update. All k
    mini-batches should have the same distribution of labels (section 3, remark 1).

    With ``validation="past"``, which is not the paper's rule, all k mini-batches are training ones,
    and :math:`\sum_{j\in V} g_j` is replaced by an average of earlier steps' mean gradients
    :math:`m_s = \frac1k\sum_i g_i` (of those, not of the updates), bias-corrected:

    .. math:: g_v = \frac{\sum_{s<t} d^{\,t-1-s}\, m_s}{\sum_{s<t} d^{\,t-1-s}}.

    The first step has no past; its update is the plain mean, ω̂ = 1/k.

    It belongs **first** in a chain: what follows sees an ordinary gradient. Weight decay, clipping,
    masks, `optax.MultiSteps` and `optax.apply_if_finite` go after it.

    Args:
        lam: λ̂ > 0. With `normalize`, only the product λ̂μ̂ matters.
        mu: μ̂ > 0; larger values spread the weights. Both may be traced or, through
            ``optax.inject_hyperparams(bilevel_reweight)(mu=schedule)``, scheduled.
        num_validation: how many leading slots form V.
        solver: "diagonal" for eq. (10), "exact" for eq. (8),
            :math:`(G_{TT}/\hat\lambda + \hat\mu I)\,\omega = G_{TV}\mathbf 1` with G the Gram
            matrix of the gradients.
        normalize: divide ω by its L1 norm; without it the step size follows the agreement
            (ablation a).
        nonnegative: clip ω at zero, before the normalisation.
        groups: None, one ω for the whole tree; "leaf", one per leaf; or a pytree of labels like
            the gradients (or a prefix, or a callable that makes one, as in `optax.partition`), one
            ω per label: the paper's weights per layer (ablation b).
        validation: "batch", the paper's rule: the first `num_validation` mini-batches validate; or
            "past": the steps before do. The state then carries one buffer like the parameters,
            float32 or wider.
        decay: d in [0, 1), with "past" alone; 0.9 where it is None. May be traced or scheduled.
        guard: with "past" alone, what happens where Σω < 0 (in a group, with `groups`), where the
            mini-batches as a whole point against the past: "zero", a zero update, so that the step
            only moves the average; or "none". "zero" where it is None.
        num_batches: k, if the state is to carry the weights. `init` cannot see k, hence static.
        allow_masked: let `optax.MaskedNode` leaves pass, for use inside an `optax.partition` whose
            other labels reduce their own stacked leaves.

    Returns:
        A transformation whose `update` takes gradients with leaves [k, \*shape] (float, bfloat16 or
        complex; sharded over devices or not) and returns leaves [\*shape] of the same dtypes.
        `init` takes parameters, abstract parameters, or None. See `BilevelReweightState`.

    Raises:
        ValueError: at construction for a hyper-parameter out of range; at trace time for leaves
            that do not share their leading axis, unstacked gradients, k ≤ num_validation, masked or
            integer leaves, naming the leaf, what was expected and what came.

    ==============================================  ==============================================
    input                                           result
    ==============================================  ==============================================
    all training gradients zero, or all ω zero      a zero update
    NaN or Inf in a training mini-batch             ω = 0 for it; counted in ``dropped``
    NaN or Inf in the validation gradient           a zero update; counted in ``dropped``
    bfloat16, float16                               products and sums in float32
    complex                                         real part of the inner product
    None leaves, empty trees                        passed through
    ``validation="past"``: the first step           the mean of the finite mini-batches
    ``validation="past"``: NaN or Inf               in neither the update nor the average
    ==============================================  ==============================================

    Example:
        >>> import jax, jax.numpy as jnp, optax, optax_bilevel
        >>> tx = optax.chain(optax_bilevel.bilevel_reweight(), optax.sgd(0.1, momentum=0.9))
        >>> params = {"w": jnp.zeros(3)}
        >>> def loss(params, batch):
        ...     x, y = batch
        ...     return jnp.mean((x @ params["w"] - y) ** 2)
        >>> x = jax.random.normal(jax.random.key(0), (8, 16, 3))  # k = 8 mini-batches of 16
        >>> batches = (x, x @ jnp.array([1.0, 2.0, 3.0]))
        >>> state = tx.init(params)
        >>> grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batches)
        >>> updates, state = tx.update(grads, state, params)
        >>> updates["w"].shape
        (3,)
    """
    rule = _rule.Rule(
        lam, mu, num_validation, solver, normalize, nonnegative, validation, decay, guard
    )
    _inner_products.check_groups(groups)

    def init_fn(params: PyTree) -> Any:
        _inner_products.check_masked(params, allow_masked)
        weights = None
        if num_batches is not None:
            k = _inner_products.static_int(num_batches)
            if k is None:
                raise ValueError(
                    "num_batches is traced; under optax.inject_hyperparams inside jit pass "
                    'static_args="num_batches"'
                )
            if groups is not None and params is None:
                raise ValueError(
                    "init(None) cannot know how many groups there are: with groups and "
                    "num_batches pass the parameters"
                )
            grouping = _inner_products.resolve_groups(params, groups)
            weights = grouping.present(jnp.zeros((grouping.num_groups, k), jnp.float32))
        if rule.from_past and params is None:
            raise ValueError(
                'init(None) cannot know the shapes of the past: with validation="past" pass the '
                "parameters"
            )
        zero = jnp.zeros((), jnp.float32)
        count = jnp.zeros((), jnp.int32)
        state = BilevelReweightState(count, zero, zero, zero, count, weights)
        state = jax.tree.map(lambda x: _inner_products.replicate_like(x, params), state)
        return state._replace(past=_past.init_past(params)) if rule.from_past else state

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        del extra_args
        _check_position()
        past = state.past
        k = _inner_products.check_stack(
            updates,
            past.average if params is None and past is not None else params,
            rule.held_out,
            num_batches=num_batches,
            allow_masked=allow_masked,
        )
        count = optax.safe_increment(state.count)
        if not jax.tree.leaves(updates):
            return updates, state._replace(count=count)
        grouping = _inner_products.resolve_groups(updates, groups)
        products = _inner_products.stack_products(
            updates,
            grouping,
            rule.held_out,
            with_gram=solver == "exact",
            past=None if past is None else past.average,
        )
        weights = _rule.weigh(products, rule, _past.has_past(past))
        total = _inner_products.weighted_sum(
            updates, weights.values, grouping, held_out=rule.held_out
        )
        new_updates = jax.tree.map(lambda x, g: x.astype(g.dtype), total, updates)
        carried = None
        if num_batches is not None:
            assert weights.values.shape[-1] == k
            carried = grouping.present(weights.values).astype(jnp.float32)
        if past is not None:
            past = _past.advance_by_stack(past, updates, products.sq_norms, grouping, rule)
        return new_updates, BilevelReweightState(count, *weights.health, weights=carried, past=past)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def bilevel_weights(
    grads: PyTree,
    lam: Any = 1.0,
    mu: Any = 0.01,
    *,
    num_validation: int = 1,
    solver: str = "diagonal",
    normalize: bool = True,
    nonnegative: bool = False,
    groups: Groups = None,
) -> jax.Array:
    r"""The weights that `bilevel_reweight` gives to a stack of gradients.

    Args:
        grads: leaves [k, \*shape].
        lam, mu, num_validation, solver, normalize, nonnegative, groups: as in `bilevel_reweight`.

    Returns:
        ω̂ of shape [k] with validation slots 0; [groups, k] when grouped, groups in the order in
        which their labels first appear among the leaves. float32 or wider.

    Raises:
        ValueError: as `bilevel_reweight`, and for a tree without leaves.

    Example:
        >>> import jax.numpy as jnp, optax_bilevel
        >>> grads = jnp.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
        >>> optax_bilevel.bilevel_weights(grads)
        Array([ 0. ,  0.5, -0.5,  0. ], dtype=float32)
    """
    rule = _rule.Rule(lam, mu, num_validation, solver, normalize, nonnegative)
    _inner_products.check_groups(groups)
    if not jax.tree.leaves(grads):
        raise ValueError("bilevel_weights needs at least one gradient leaf, got an empty tree")
    _inner_products.check_stack(grads, None, num_validation)
    grouping = _inner_products.resolve_groups(grads, groups)
    products = _inner_products.stack_products(
        grads, grouping, num_validation, with_gram=solver == "exact"
    )
    return grouping.present(_rule.weigh(products, rule).values)


# optax wrappers that choose between the update and zeros of the *incoming* gradients' shape: with
# stacked gradients their two branches disagree, and JAX's error says nothing of the cause.
_WRAPPERS = {"apply_if_finite", "conditionally_transform", "conditionally_mask", "MultiSteps"}


def _check_position() -> None:
    """Raises ValueError inside an optax wrapper that cannot take stacked gradients."""
    frame = sys._getframe(2)
    while frame is not None:
        wrapper = frame.f_code.co_qualname.partition(".")[0]
        if wrapper in _WRAPPERS and frame.f_globals.get("__name__", "").startswith("optax."):
            raise ValueError(
                f"optax.{wrapper} passes updates of the gradients' own shape and cannot wrap "
                "bilevel_reweight, whose updates lose the leading axis. The reweighting belongs "
                f"first in the chain, {wrapper} after it: "
                f"optax.chain(bilevel_reweight(...), optax.{wrapper}(...))"
            )
        frame = frame.f_back
