"""The next step validates: steps as long as fresh mini-batches agree with the steps before.

`validation="past"` weighs mini-batches by the past. This weighs the past by mini-batches: the
optimizer moves along what it has gathered so far, by as much of a step as the k mini-batches, which
none of it has seen, point the same way. Not in the paper.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_bilevel import _inner_products, _rule, _shards
from optax_bilevel._inner_products import AxisName, PyTree
from optax_bilevel._stream import Stream


class CoherentStepsState(NamedTuple):
    """State of `coherent_steps`.

    Attributes:
        count: number of updates so far, int32 [].
        coherence: s̄, the average coherence, float32 [], in [-1, 1]; 1 after the first step.
        variance: v, of s about s̄, float32 [], ≥ 0; 0 after the first step.
        step_size: what the last update was multiplied by, float32 [], in [0, 1]; 1 before any.
        direction: p, the average of the mean gradients, as params, float32 or wider.
        loss: the average of `value`, float32 []; infinite before any. Stays so without
            ``warmup_loss``.
        learning: whether that average has been below ``warmup_loss``, bool [].
        inner_state: state of the wrapped optimizer.
    """

    count: Any  # jax.Array; the name hides tuple.count, as in every optax state
    coherence: jax.Array
    variance: jax.Array
    step_size: jax.Array
    direction: PyTree
    loss: jax.Array
    learning: jax.Array
    inner_state: Any


def mean_and_coherence(
    grads: PyTree,
    direction: PyTree,
    *,
    axis_name: AxisName | None = None,
    example_axis: AxisName | None = None,
) -> tuple[PyTree, jax.Array]:
    r"""The mean of k mini-batch gradients, and how far they agree with a direction.

    .. math:: m = \frac1k\sum_i g_i, \qquad
        s = \frac{\sum_i c_i}{\sum_i |c_i|}, \quad c_i = \frac{\langle p, g_i\rangle}{|g_i|}.

    The coherence s is 1 where all mini-batches point with p, -1 where all point against it, and
    near 0 where they know nothing of it. It is the sum of the weights of eq. (10), normalised, with
    p for the validation gradient, and every gradient counted by its direction alone.

    Args:
        grads: leaves [k, \*shape]; with `axis_name` the gradient of this device's own mini-batch,
            [\*shape].
        direction: p, leaves [\*shape]: ``state.direction`` of `coherent_steps`.
        axis_name: inside `jax.shard_map` or `jax.pmap`, the axis (or tuple of axes) along which
            there is one mini-batch per device. Moves what `jax.lax.pmean` moves, in the one
            all-reduce that it consists of, and three scalars.
        example_axis: a second axis (or tuple) over which the examples of one mini-batch are spread;
            its gradient is their mean. Moves what `jax.lax.pmean` over all axes moves, in an
            all-to-all and an all-gather over this axis and an all-reduce of shards between.

    Returns:
        m, leaves [\*shape] of the dtypes of `grads`, and s, float32 or wider []. A mini-batch with
        a NaN or an Inf enters neither. Where none is left m and s are zero; where p is zero, s is.

    Raises:
        ValueError: at trace time where `grads` and `direction` do not fit, naming the leaf; inside
            `jax.shard_map`, for a gradient that is already the same on all devices, as in
            `bilevel_pmean`.

    Example:
        >>> import jax.numpy as jnp, optax_bilevel
        >>> stack = jnp.array([[1.0, 0.0], [3.0, 0.0], [-0.5, 0.0], [0.0, 1.0]])
        >>> mean, s = optax_bilevel.mean_and_coherence(stack, jnp.array([1.0, 0.0]))
        >>> float(s)  # (1 + 1 - 1 + 0) / 3
        0.3333333432674408
    """
    if axis_name is not None:
        remedy = "With axis_name give the gradient of this device's mini-batch, not a stack"
        _inner_products.check_like(grads, direction, remedy)
        _inner_products.check_varying(grads, axis_name)
    elif example_axis is not None:
        raise ValueError("example_axis needs axis_name, the axis of the mini-batches")
    else:
        _inner_products.check_stack(grads, direction, 0)
    if not jax.tree.leaves(grads):
        return grads, jnp.zeros(())
    spread, stack = 1, grads
    if example_axis is not None:
        _inner_products.check_varying(grads, example_axis)
        spread = jax.lax.axis_size(example_axis)
    if spread > 1:  # this device's shard of the mini-batch's gradient, and of the direction
        # Not by psum_scatter, which XLA may compile to an all-reduce: twice the bytes.
        stack = _shards.exchange(grads, example_axis, spread)
        direction = _shards.own(direction, example_axis)
    elif axis_name is not None:
        if example_axis is not None:  # says that there is nothing to average
            stack = jax.lax.pmean(grads, example_axis)
        stack = jax.tree.map(lambda g: g[None], stack)
    grouping = _inner_products.resolve_groups(stack, None)
    products = _inner_products.stack_products(stack, grouping, 0, with_gram=False, past=direction)
    if spread > 1:
        products = jax.lax.psum(products, example_axis)
    total = _inner_products.finite_sum(stack, products.sq_norms, grouping)
    mean, coherence = _mean_and_coherence(total, products.dots, products.sq_norms, grads, axis_name)
    if spread > 1:
        mean = _shards.gather(mean, grads, example_axis)
    return mean, coherence


def coherent_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    loop: str | None = None,
    chunk_size: int | None = 1,
    axis_name: AxisName | None = None,
) -> Callable[..., tuple[Any, PyTree, jax.Array]]:
    """Like `jax.value_and_grad`, over k mini-batches, giving their mean gradient and coherence.

    Computes what `jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))` followed by `mean_and_coherence`
    computes, without ever holding k gradients: beside the gradient at hand (or `chunk_size` of
    them) there is their sum, whatever k is.

    Args:
        loss_fn, has_aux, loop, chunk_size: as in `bilevel_value_and_grad`.
        axis_name: inside `jax.shard_map` or `jax.pmap`, the axis (or tuple of axes) over whose D
            devices the k = m·D mini-batches are spread, m on each; `batches` leads with this
            device's own m. `params` and the direction are the same on all devices. Moves what
            `jax.lax.pmean` moves, and three scalars.

    Returns:
        A function ``(params, batches, direction) -> (value, mean, s)``. Leaves of `batches` lead
        with k; random keys, one per mini-batch, are ordinary leaves. `direction` is
        ``state.direction`` of `coherent_steps`. `value` is the losses [k], or ``(losses, aux)``
        with aux leaves [k, ...]; `mean` and `s` are those of `mean_and_coherence`, `mean` of the
        dtypes of `params`. With `axis_name` losses and aux are those of this device's own m
        mini-batches; `mean` and `s`, of all k, are the same on all devices.

    Raises:
        ValueError: at construction for an unknown loop or a chunk size out of range; at trace time
            for leaves of `batches` that do not share their leading axis, for no leaves at all, and
            for a direction that is not like `params`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, optax_bilevel
        >>> loss = lambda w, batch: jnp.mean((batch["x"] @ w - batch["y"]) ** 2)
        >>> batches = {"x": jnp.ones((4, 2, 3)), "y": jnp.ones((4, 2))}  # k = 4 mini-batches of 2
        >>> step = optax_bilevel.coherent_value_and_grad(loss)
        >>> tx = optax_bilevel.coherent_steps(optax.sgd(0.1, momentum=0.9))
        >>> w = jnp.zeros(3)
        >>> state = tx.init(w)
        >>> losses, mean, s = step(w, batches, state.direction)
        >>> updates, state = tx.update(mean, state, w, coherence=s)
        >>> losses.shape, updates.shape
        ((4,), (3,))
    """
    stream = Stream(loss_fn, has_aux, loop, chunk_size)

    def coherent(params: PyTree, batches: PyTree, direction: PyTree) -> tuple[Any, ...]:
        count = stream.check_inputs(params, batches, 0)
        remedy = "take state.direction of coherent_steps"
        _inner_products.check_average(direction, params, "direction", remedy)
        grouping = _inner_products.resolve_groups(params, None)
        if axis_name is not None:
            # Or shard_map would add up the gradients over the devices, each time.
            params, direction = _inner_products.vary((params, direction), axis_name)
        chunks = stream.over(params, batches)

        def compare(start: Any, size: int, one: Any) -> tuple[PyTree, Any]:
            values, grads = chunks.differentiate(start, size, one)
            dots = _inner_products.dots_with(grads, direction, grouping)
            sq_norms = _inner_products.squared_norms(grads, grouping)
            total = _inner_products.finite_sum(grads, sq_norms, grouping)
            return total, (values, dots.T, sq_norms.T)

        zeros = _inner_products.wide_zeros(params)
        total, records = chunks.add_up(compare, zeros, 0, count)
        values, dots, sq_norms = jax.tree.map(lambda *x: jnp.concatenate(x), *records)
        return values, *_mean_and_coherence(total, dots.T, sq_norms.T, params, axis_name)

    return coherent


def _mean_and_coherence(
    total: PyTree,
    dots: jax.Array,
    sq_norms: jax.Array,
    like: PyTree,
    axis_name: AxisName | None,
) -> tuple[PyTree, jax.Array]:
    """The mean m and the coherence s of all mini-batches.

    Args:
        total: Σ_i g_i over the finite mini-batches of this device, leaves [*shape].
        dots: ⟨p, g_i⟩ of this device, [1, n].
        sq_norms: |g_i|² of this device, [1, n].
        like: a tree whose leaves have the dtypes of m.
        axis_name: to add up over devices.
    """
    cosines = _rule.projections(dots, sq_norms)
    sums = (
        jnp.sum(cosines),
        jnp.sum(jnp.abs(cosines)),
        jnp.sum(_rule.finite(sq_norms)).astype(cosines.dtype),
    )
    k = dots.shape[-1]
    if axis_name is not None:
        k *= jax.lax.axis_size(axis_name)
        # Narrow types travel as such; divided first, for their sum could overflow.
        total = jax.tree.map(lambda x, g: (x / k).astype(g.dtype), total, like)
        total, sums = jax.lax.psum((total, sums), axis_name)
    else:
        total = jax.tree.map(lambda x: x / k, total)
    signed, absolute, count = sums
    rest = k / jnp.maximum(count, 1)  # 1 but where a mini-batch was left out
    mean = jax.tree.map(lambda x, g: _inner_products.scaled(x, rest).astype(g.dtype), total, like)
    return mean, jnp.where(absolute > 0, signed / jnp.where(absolute > 0, absolute, 1), 0)


def coherent_steps(
    opt: optax.GradientTransformation,
    *,
    decay: Any = 0.97,
    coherence_decay: Any = 0.9,
    gain: Any = 4.0,
    margin: Any = 0.0,
    warmup_steps: Any = 0,
    warmup_loss: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales an optimizer's steps by how far fresh mini-batches agree with the steps before.

    .. math:: \bar s_t = d_s\,\bar s_{t-1} + (1-d_s)\, s_t, \qquad
        \text{update} = \min(\max(\gamma\,(\bar s_t - z\,\sigma_t), 0), 1)\; \text{opt}(m_t), \qquad
        p_t = d\, p_{t-1} + (1-d)\, m_t,

    with m_t and s_t of `mean_and_coherence` at p_{t-1}, and :math:`\bar s_1 = 1`. σ is the standard
    deviation of s̄, from a running variance v of s about it:

    .. math:: v_t = d_s\,v_{t-1} + (1-d_s)(s_t - \bar s_{t-1})(s_t - \bar s_t), \qquad
        \sigma_t^2 = \frac{1-d_s}{1+d_s}\, v_t, \qquad v_1 = 0.

    The steps end where nothing more is learnt that holds for other mini-batches. The signed s is
    averaged before it is clipped: clipped at once, its noise alone would add up to steps; z takes
    off what is left of that. It scales what the optimizer *moves*, after its momentum: gradients
    held back would leave the momentum to coast on.

    Args:
        opt: the optimizer, with its learning rate, such as ``optax.sgd(0.03, momentum=0.9)``. It
            gets the plain mean gradient.
        decay: d in [0, 1), of the direction. A long memory, since p need not be where the
            parameters are: it need only tell what mini-batches share from what they do not. May be
            traced.
        coherence_decay: d_s in [0, 1), of the average coherence; a short memory, so that the steps
            end when the coherence does. May be traced.
        gain: γ > 0; the steps are whole ones where s̄ - zσ is above 1/γ. A smaller one refuses more
            and learns more slowly. May be traced.
        margin: z ≥ 0; by how many of its standard deviations s̄ must be above zero before there are
            steps. Take 1, with a decay of 0.99, for trainings of ten thousand steps, in which those
            taken by chance add up to memorising. Short trainings learn less with it. May be traced.
        warmup_steps: that many first steps are whole, whatever s̄ says, ≥ 0. A network that starts
            on a plateau, as deep ones without normalisation do, finds no coherence there, and would
            not leave it; memorising takes longer. A tenth of the training is a good start. May be
            traced.
        warmup_loss: steps are whole beyond `warmup_steps`, too, until the average of `value`, with
            decay d, has been below this once: until the network has left its plateau, however long
            that takes. For the cross-entropy of C classes ``0.98 * math.log(C)``, just below the
            loss of guessing. Without it a network that is still on its plateau after
            `warmup_steps` may learn nothing. May be traced.

    Returns:
        A transformation whose `update` takes the mean gradient, and as extra arguments s,
        ``coherence``, and with `warmup_loss` the mean loss of the k mini-batches, ``value``, the
        same on all devices; one that is not finite counts for nothing. `init` takes parameters, or
        abstract ones. See `CoherentStepsState`. Beside the wrapped optimizer's state it holds one
        buffer like the parameters.

    Raises:
        ValueError: at construction for a hyper-parameter out of range, at trace time for gradients
            that are not shaped like the parameters, without ``coherence``, or without a scalar
            ``value`` where there is a `warmup_loss`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, optax_bilevel
        >>> tx = optax_bilevel.coherent_steps(optax.sgd(0.1, momentum=0.9))
        >>> params = jnp.zeros(3)
        >>> state = tx.init(params)
        >>> for step in range(2):
        ...     stack = jax.random.normal(jax.random.key(step), (8, 3)) + 1.0  # k = 8 gradients
        ...     mean, s = optax_bilevel.mean_and_coherence(stack, state.direction)
        ...     updates, state = tx.update(mean, state, params, coherence=s)
        >>> bool(0.9 < state.coherence <= 1)
        True
    """
    _rule.check_decay("decay", decay)
    _rule.check_decay("coherence_decay", coherence_decay)
    _rule.check_positive("gain", gain)
    _rule.check_not_negative("margin", margin)
    _rule.check_not_negative("warmup_steps", warmup_steps)
    inner = optax.with_extra_args_support(opt)

    def init_fn(params: PyTree) -> Any:
        _inner_products.check_masked(params, allow_masked=False)

        def scalar(value: float, dtype: Any = jnp.float32) -> jax.Array:
            return _inner_products.replicate_like(jnp.array(value, dtype), params)

        return CoherentStepsState(
            count=scalar(0, jnp.int32),
            coherence=scalar(0),
            variance=scalar(0),
            step_size=scalar(1),
            direction=_inner_products.wide_zeros(params),
            loss=scalar(jnp.inf),
            learning=scalar(False, bool),
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: PyTree,
        state: Any,
        params: PyTree | None = None,
        *,
        coherence: jax.Array | None = None,
        value: jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        remedy = (
            "mean, s = mean_and_coherence(grads, state.direction); "
            "tx.update(mean, state, params, coherence=s)"
        )
        if coherence is None:
            raise ValueError(f"coherent_steps needs the coherence of the step: {remedy}")
        _inner_products.check_like(
            updates, state.direction, f"coherent_steps takes the mean of the k gradients: {remedy}"
        )
        if warmup_loss is not None and (value is None or jnp.ndim(value) != 0):
            raise ValueError(
                "coherent_steps with warmup_loss needs the mean loss of the step, a scalar: "
                "tx.update(mean, state, params, coherence=s, value=jnp.mean(losses))"
            )
        first = state.count == 0
        smoothed, variance, factor = _rule.step_factor(
            state.coherence, state.variance, coherence, first, coherence_decay, gain, margin
        )
        whole = state.count < warmup_steps
        loss, learning = state.loss, state.learning
        if warmup_loss is not None:
            loss = _rule.average_loss(loss, value, decay)
            learning |= ~whole & (loss < warmup_loss)
            whole = ~learning
        factor = jnp.where(whole, jnp.ones_like(factor), factor)
        direction = _inner_products.blend(state.direction, updates, decay)
        if value is not None:
            extra_args["value"] = value
        new_updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        new_updates = _inner_products.scaled(new_updates, factor)
        count = optax.safe_increment(state.count)
        return new_updates, CoherentStepsState(
            count, smoothed, variance, factor, direction, loss, learning, inner_state
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
