"""The stacked form: k gradients along a leading axis in, one reweighted update out.

Jenni & Favaro, *Deep Bilevel Learning*, ECCV 2018, eqs. (8), (10) and (11).
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_bilevel import _mesh, _rule, _tree, _validate
from optax_bilevel._tree import Groups, PyTree


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
    """

    count: Any  # jax.Array; the name hides tuple.count, as in every optax state
    cosine: jax.Array
    negative: jax.Array
    effective: jax.Array
    dropped: jax.Array
    weights: jax.Array | None


def bilevel_reweight(
    lam: ArrayLike = 1.0,
    mu: ArrayLike = 0.01,
    *,
    num_validation: int = 1,
    solver: Literal["diagonal", "exact"] = "diagonal",
    normalize: bool = True,
    nonnegative: bool = False,
    groups: Groups = None,
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
    mini-batches should have the same labels (section 3, remark 1): `stratified_batches`.

    It belongs **first** in a chain: what follows sees an ordinary gradient. Weight decay, clipping
    and masks go after it. `optax.MultiSteps` and `optax.apply_if_finite`, which pass updates of the
    gradients' own shape, go after it, or around a chain that begins with what stacks and then
    reweights.

    Args:
        lam: λ̂ > 0. With `normalize`, only the product λ̂μ̂ matters.
        mu: μ̂ > 0; larger values spread the weights. Where the loss is scaled by S, as for
            float16, multiply it by S². Both may be traced or, through
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
    rule = _validate.rule(lam, mu, num_validation, groups, solver, normalize, nonnegative)

    def init_fn(params: PyTree) -> Any:
        if not allow_masked:
            _validate.no_masked(params)
        weights = None
        if num_batches is not None:
            k = _validate.num_batches(num_batches, groups, params)
            grouping = _tree.resolve_groups(params, groups)
            weights = grouping.present(jnp.zeros((grouping.num_groups, k), jnp.float32))
        state = BilevelReweightState(
            count=jnp.zeros((), jnp.int32),
            cosine=jnp.zeros((), jnp.float32),
            negative=jnp.zeros((), jnp.float32),
            effective=jnp.zeros((), jnp.float32),
            dropped=jnp.zeros((), jnp.int32),
            weights=weights,
        )
        return jax.tree.map(lambda x: _mesh.replicate_like(x, params), state)

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        del extra_args
        _validate.stack(
            updates,
            params,
            rule.num_validation,
            num_batches=num_batches,
            allow_masked=allow_masked,
        )
        count = optax.safe_increment(state.count)
        if not jax.tree.leaves(updates):
            return updates, state._replace(count=count)
        grouping, weights = _weigh(updates, rule, groups)
        total = _tree.weighted_sum(updates, weights.values, grouping, held_out=rule.num_validation)
        new_updates = jax.tree.map(lambda x, g: x.astype(g.dtype), total, updates)
        carried = None
        if num_batches is not None:
            carried = grouping.present(weights.values).astype(jnp.float32)
        return new_updates, BilevelReweightState(count, *weights.health, weights=carried)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def bilevel_weights(
    grads: PyTree,
    lam: ArrayLike = 1.0,
    mu: ArrayLike = 0.01,
    *,
    num_validation: int = 1,
    solver: Literal["diagonal", "exact"] = "diagonal",
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
    rule = _validate.rule(lam, mu, num_validation, groups, solver, normalize, nonnegative)
    if not jax.tree.leaves(grads):
        raise ValueError("bilevel_weights needs at least one gradient leaf, got an empty tree")
    _validate.stack(grads, None, num_validation)
    grouping, weights = _weigh(grads, rule, groups)
    return grouping.present(weights.values)


def _weigh(grads: PyTree, rule: _rule.Rule, groups: Groups) -> tuple[_tree.Grouping, _rule.Weights]:
    grouping = _tree.resolve_groups(grads, groups)
    products = _tree.stack_products(
        grads, grouping, rule.num_validation, with_gram=rule.solver == "exact"
    )
    return grouping, _rule.weigh(products, rule)
