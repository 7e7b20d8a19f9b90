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

# One setting for all (docs/coherent_steps.md has the study).
_DECAY = 0.97  # of the direction: about the last thirty steps
_HORIZON = 0.02  # of the training, that agreement is averaged over
_STEPS = 50  # the same where nobody says how long the training is
_PRIOR = 5  # steps in full agreement that the average begins with
_MARGIN = 0.5  # deviations by which agreement must be above zero
_RATE = 2.0  # the most that a horizon of steps changes the logarithm of the step size by
_SMALLEST = 1e-3


class CoherentStepsState(NamedTuple):
    """State of `coherent_steps`; read a field with ``optax.tree.get(state, "step_size")``.

    Attributes:
        count: updates so far, int32 [].
        judged: updates so far that a held-out example had a say in, int32 [].
        agreement: s̄, how far held-out examples have gained by steps of late, float32 [], in
            [-1, 1].
        variance: of s about s̄, float32 [], ≥ 0.
        step_size: what the last update was multiplied by, float32 [], in [0, 1]; 1 before any.
        excluded: held-out examples left out of the last update for a NaN or an Inf, int32 [].
        direction: v, the average of what the optimizer has proposed, as params, float32 or wider.
        inner_state: state of the wrapped optimizer.
    """

    count: Any  # jax.Array; the name hides tuple.count, as in every optax state
    judged: jax.Array
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

    ::

        tx = optax_bilevel.coherent_steps(optax.adamw(1e-3), total_steps=num_steps)
        updates, state = tx.update(
            grads, state, params, losses_fn=lambda p: losses(p, held_out)
        )

    With v the average of what the optimizer has proposed in the steps before, example e of the
    held-out ones would gain :math:`d_e = -\langle\nabla\ell_e, v\rangle`, and all of them agree by

    .. math:: s = \frac{\sum_e d_e}{\sum_e |d_e|} \in [-1, 1].

    DOC
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
            judged=scalar(0, jnp.int32),
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
        _validate.held_out(losses_fn, alignment, params)
        _validate.one_gradient(
            updates, state.direction, "coherent_steps takes an ordinary gradient, of one batch"
        )
        if losses_fn is not None:
            alignment = example_alignment(
                lambda params, _: losses_fn(params), params, None, state.direction
            )
        gained, all_of_it, excluded = _agreement(alignment)
        if axis_name is not None:
            gained, all_of_it, excluded = jax.lax.psum((gained, all_of_it, excluded), axis_name)
        horizon = _STEPS if total_steps is None else _HORIZON * jnp.real(total_steps)
        judgement = _judge(state, gained, all_of_it, jnp.asarray(horizon, jnp.float32))

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


def _agreement(alignment: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Σ d_e and Σ |d_e|, float32 [], over the finite ones, and how many were not, int32 []."""
    gains = -jnp.asarray(alignment)
    usable = jnp.isfinite(gains)
    # By the largest: a sum of very small ones, or of very large ones, is still a number.
    gains = jnp.where(usable, gains, 0)
    return (
        jnp.sum(gains).astype(jnp.float32),
        jnp.sum(jnp.abs(gains)).astype(jnp.float32),
        jnp.sum(~usable, dtype=jnp.int32),
    )


def _judge(
    state: CoherentStepsState, gained: jax.Array, all_of_it: jax.Array, horizon: jax.Array
) -> dict[str, jax.Array]:
    """The scalars of the state after a step; as they were where no example had a say in it."""
    has_say = all_of_it > 0
    judged = state.judged + has_say
    agreement = gained / jnp.where(has_say, all_of_it, 1)
    # An average of all steps at first, and then of about the last `horizon`.
    rate = jnp.maximum(1 / horizon, 1 / (judged + _PRIOR).astype(jnp.float32))
    rate = jnp.minimum(rate, 1)
    surprise = agreement - state.agreement
    average = state.agreement + rate * surprise
    variance = (1 - rate) * (state.variance + rate * jnp.square(surprise))
    deviation = jnp.sqrt(variance * rate / (2 - rate))
    evidence = average / jnp.maximum(deviation, jnp.finfo(jnp.float32).tiny) - _MARGIN
    change = jnp.minimum(_RATE / horizon, 1) * jnp.clip(evidence, -1, 1)
    step_size = jnp.clip(state.step_size * jnp.exp(change), _SMALLEST, 1)
    after = {
        "judged": judged,
        "agreement": average,
        "variance": variance,
        "step_size": step_size,
    }
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
