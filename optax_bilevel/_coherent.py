"""Steps as long as held-out examples gain from them: any optimizer, any network, any batch.

The paper's upper-level problem with one weight, the step's length, and examples that are never
trained on for V. Not in the paper; docs/coherent_steps.md derives it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_bilevel import _mesh, _tree, _validate
from optax_bilevel._alignment import example_alignment
from optax_bilevel._mesh import AxisName
from optax_bilevel._tree import PyTree

# One setting for all; docs/coherent_steps.md has the study.
_DECAY = 0.97  # of the direction: about the last thirty steps
_HORIZON = 0.01  # H as a share of the training
_STEPS = 50  # H where nobody says how long the training is
_MARGIN = 0.5  # deviations by which agreement must be above zero for steps to grow
_LARGEST = 6.0  # medians: more than that no example counts
_SMALLEST = 1e-3  # step size, so that it can grow again


class CoherentStepsState(NamedTuple):
    """State of `coherent_steps`; read a field with ``optax.tree.get(state, "step_size")``.

    Attributes:
        count: updates so far, int32 [].
        agreement: s̄, how far held-out examples have agreed with the steps of late, float32 [], in
            [-1, 1]; 1 before any.
        variance: of s about s̄, float32 [], ≥ 0.
        step_size: what the last update was multiplied by, float32 [], in [0, 1]; 1 before any.
        excluded: held-out examples left out of the last update for a NaN or an Inf, int32 [].
        direction: v, the average of what the optimizer has proposed, as params, float32 or wider.
        inner_state: state of the wrapped optimizer.
    """

    count: Any  # jax.Array; the name hides tuple.count, as in every optax state
    agreement: jax.Array
    variance: jax.Array
    step_size: jax.Array
    excluded: jax.Array
    direction: PyTree
    inner_state: Any


def coherent_steps(
    opt: optax.GradientTransformation,
    *,
    total_steps: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales an optimizer's steps by how far held-out examples would gain from them.

    The optimizer proposes a step :math:`u_t`, and a part of it is taken,
    :math:`\theta_{t+1} = \theta_t + f_t u_t`. With the average of the proposals before,
    :math:`v_t = 0.97\,v_{t-1} + 0.03\,u_{t-1}`, held-out example e would gain
    :math:`d_e = -\langle\nabla\ell_e(\theta_t), v_t\rangle`, and all n agree by

    .. math:: s_t = \frac{\sum_e d_e}{\sum_e |d_e|} \in [-1, 1],

    no :math:`|d_e|` counting for more than six of their medians. Where the average
    :math:`\bar s_t` is above zero by more than half of its own standard deviation
    :math:`\sigma_t`, steps grow, up to whole ones; where it is not, they shrink:

    .. math:: f_t = \min\!\Big(1,\ f_{t-1}\,
        \exp\frac{\mathrm{clip}(\bar s_t/\sigma_t - \frac12,\, -1,\, 1)}{H}\Big).

    The averages are over about the last H steps, 1% of `total_steps`, and start from
    :math:`\bar s = 1`. Wrong labels agree on nothing
    that held-out examples would gain from, so that steps end before they are memorised.

    Args:
        opt: the optimizer, whole: with learning rate, momentum, weight decay.
        total_steps: how long the training is, in updates; may be traced. None: H is 50 steps.
        axis_name: inside `jax.shard_map` or `jax.pmap`, the axis (or tuple of axes) over which the
            held-out examples are spread; it moves one number per example. Gradients must be
            averaged before, as always. Under `jit` nothing is needed.

    Returns:
        A transformation whose `update` takes the gradient of an ordinary batch and, by keyword, one
        of

        - ``losses_fn``: ``losses_fn(params) -> [n]``, the losses of n examples that are not trained
          on, under their given labels, right or wrong; other examples every step. 16 of a tenth
          that is kept back do. It needs a forward-mode derivative (no `jax.custom_vjp`). With batch
          norm run it in training mode and drop the new running averages.
        - ``alignment``: :math:`\langle\nabla\ell_e, v\rangle`, [n], by ``example_alignment(...,
          state.direction)``, for those who want the logits of the same pass.

        Other keywords reach `opt`. Updates have the dtypes that `opt` gives. Beside the state of
        `opt` there is one buffer like the parameters, float32 or wider. See `CoherentStepsState`.

    Raises:
        ValueError: at construction for `total_steps` that is not positive; in `init` for a leaf
            that is no floating-point array; at trace time without held-out examples, for losses
            that are one scalar, and for a gradient that is not like the parameters.

    ==============================================  ==============================================
    input                                           result
    ==============================================  ==============================================
    NaN or Inf in a held-out example                left out; counted in ``excluded``
    none finite, n = 0, or a direction of zeros     the step size stays as it was
    losses [n, tokens]                              every entry counts as an example
    NaN or Inf in a proposed update                 passed on as it is; not in the direction
    Python floats as parameters or gradients        taken for arrays
    integer, key, bool or function leaves           an error in ``init`` that names the leaf
    bfloat16, float16                               sums and direction in float32
    the same leaves in another container            compared leaf by leaf
    ==============================================  ==============================================

    Example:
        >>> import jax, jax.numpy as jnp, optax, optax_bilevel
        >>> def losses(w, batch):
        ...     x, y = batch
        ...     return (x @ w - y) ** 2
        >>> x = jax.random.normal(jax.random.key(0), (80, 3))
        >>> y = x @ jnp.array([1.0, 2.0, 3.0])
        >>> batch, held_out = (x[:64], y[:64]), (x[64:], y[64:])
        >>> tx = optax_bilevel.coherent_steps(optax.adam(0.1), total_steps=100)
        >>> params = jnp.zeros(3)
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     grads = jax.grad(lambda w: losses(w, batch).mean())(params)
        ...     updates, state = tx.update(
        ...         grads, state, params, losses_fn=lambda w: losses(w, held_out)
        ...     )
        ...     params = optax.apply_updates(params, updates)
        >>> float(state.step_size)
        1.0
    """
    if total_steps is not None:
        _validate.positive("total_steps", total_steps)
    inner = optax.with_extra_args_support(opt)

    def init_fn(params: PyTree) -> Any:
        params = _tree.as_arrays(params)
        _validate.parameters(params)

        def scalar(value: float, dtype: Any = jnp.float32) -> jax.Array:
            return _mesh.replicate_like(jnp.array(value, dtype), params)

        return CoherentStepsState(
            count=scalar(0, jnp.int32),
            agreement=scalar(1),
            variance=scalar(0),
            step_size=scalar(1),
            excluded=scalar(0, jnp.int32),
            direction=_tree.wide_zeros(params),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        losses_fn: Callable[[PyTree], jax.Array] | None = None,
        alignment: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        updates = _tree.as_arrays(updates)
        _validate.held_out(losses_fn, alignment, params)
        _validate.one_gradient(
            updates, state.direction, "coherent_steps takes an ordinary gradient, of one batch"
        )
        if not jax.tree.leaves(updates):
            return updates, state._replace(count=optax.safe_increment(state.count))
        if losses_fn is not None:
            alignment = example_alignment(
                lambda params, _: losses_fn(params), params, None, state.direction
            )
        agreement, has_say, excluded = _agreement(alignment, axis_name)
        horizon = _STEPS if total_steps is None else _HORIZON * jnp.real(total_steps)
        judgement = _judge(state, agreement, has_say, jnp.asarray(horizon, jnp.float32))

        proposed, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        moved = jax.tree.map(lambda u: _scaled(u, judgement["step_size"]), proposed)
        return moved, CoherentStepsState(
            count=optax.safe_increment(state.count),
            excluded=excluded,
            direction=_averaged(state.direction, proposed),
            inner_state=inner_state,
            **judgement,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _agreement(
    alignment: Any, axis_name: AxisName | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How far held-out examples agree with a direction.

    Args:
        alignment: ⟨∇ℓ_e, v⟩ of this device's own, [n] or of more axes.
        axis_name: over which they are spread.

    Returns:
        s, float32 []; whether an example had a say in it, bool []; and how many had none for a NaN
        or an Inf, int32 [].
    """
    gains = -jnp.ravel(_mesh.replicate(jnp.asarray(alignment))).astype(jnp.float32)
    if axis_name is not None:
        to = _mesh.same_everywhere(axis_name)
        gains = jax.lax.all_gather(gains, axis_name, tiled=True, to=to)
    usable = jnp.isfinite(gains)
    gains = jnp.where(usable, gains, 0)
    sizes = jnp.abs(gains)
    # Of a clean set the few examples that the network gets wrong would outweigh all the others.
    sizes = jnp.append(jnp.where(sizes > 0, sizes, jnp.nan), jnp.nan)  # or n = 0 is an error
    median = jnp.nanmedian(sizes)
    gains = jnp.clip(gains / median, -_LARGEST, _LARGEST)
    total = jnp.sum(jnp.abs(gains))
    has_say = total > 0  # False for the NaN of no median
    agreement = jnp.where(has_say, jnp.sum(gains) / jnp.where(has_say, total, 1), 0)
    return agreement, has_say, jnp.sum(~usable, dtype=jnp.int32)


def _judge(
    state: CoherentStepsState, agreement: jax.Array, has_say: jax.Array, horizon: jax.Array
) -> dict[str, jax.Array]:
    """The scalars of the state after a step; as they were where no example had a say in it.

    Args:
        state: before the step.
        agreement: s, float32 [].
        has_say: bool [].
        horizon: H, float32 [].
    """
    rate = jnp.minimum(1 / horizon, 1)
    surprise = agreement - state.agreement
    average = state.agreement + rate * surprise
    variance = (1 - rate) * (state.variance + rate * jnp.square(surprise))
    # Of an exponential average of independent s.
    deviation = jnp.sqrt(variance * rate / (2 - rate))
    evidence = average / jnp.maximum(deviation, jnp.finfo(jnp.float32).tiny)
    change = rate * jnp.clip(evidence - _MARGIN, -1, 1)
    step_size = jnp.clip(state.step_size * jnp.exp(change), _SMALLEST, 1)
    after = {"agreement": average, "variance": variance, "step_size": step_size}
    return {name: jnp.where(has_say, x, getattr(state, name)) for name, x in after.items()}


def _averaged(direction: PyTree, proposed: PyTree) -> PyTree:
    """The direction with a proposal in it; what is not finite stays out."""

    def leaf(v: jax.Array, u: jax.Array) -> jax.Array:
        u = u.astype(v.dtype)
        return jnp.where(jnp.isfinite(u), v + (1 - _DECAY) * (u - v), v)

    leaves, treedef = jax.tree.flatten(direction)
    return treedef.unflatten(map(leaf, leaves, jax.tree.leaves(proposed)))


def _scaled(u: jax.Array, factor: jax.Array) -> jax.Array:
    wide = _tree.accumulation_dtype(u.dtype)
    return (factor.astype(wide) * u.astype(wide)).astype(u.dtype)
