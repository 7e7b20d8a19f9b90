"""How the gradient of every single example points against a direction.

⟨∇ℓ_e, v⟩ is the derivative of example e's loss along v, and one forward-mode pass gives it for all
examples of a batch at once: no gradient, let alone one per example, is ever formed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_bilevel import _tree, _validate
from optax_bilevel._tree import PyTree


def example_alignment(
    loss_fn: Callable[..., Any],
    params: PyTree,
    batch: PyTree,
    direction: PyTree,
    *,
    has_aux: bool = False,
) -> Any:
    r"""The inner product of every example's gradient with a direction v.

    A small step along -v changes the loss of example e by
    :math:`-\langle\nabla\ell_e, v\rangle` to first order: with a mean gradient as v, a negative
    value is an example that gets worse as the others get better. With ``state.direction`` of
    `coherent_steps`, which is a step and no gradient, it is the other way round: a negative value
    is an example that gains. Those of a mini-batch average to the numerator of eq. (10).

    One `jax.jvp` of `loss_fn` along v, in place of one gradient per example. Each product of a
    layer becomes three, so that it costs two to four forward passes, and it holds the activations
    of two layers or so: nothing is kept for a backward pass.

    Args:
        loss_fn: ``loss_fn(params, batch) -> losses``, one real loss per example, [b]: the loss
            function of `bilevel_value_and_grad` without the mean at its end. Losses of more axes,
            say [b, tokens], give as many inner products. With `has_aux`, ``-> (losses, aux)``. It
            must have a forward-mode derivative, which a `jax.custom_vjp` inside it has not. Where
            examples share batch statistics, as batch norm in training mode makes them, it is the
            gradient through these too: evaluation mode keeps examples apart.
        params: parameters, float or complex leaves; `None` leaves are passed by.
        batch: b examples, whatever `loss_fn` takes.
        direction: v, leaves of the shapes of `params` in the same order, in containers of any
            kind, of any float dtype: for instance what `jax.grad` gave, or the momentum of an
            optimizer. Its length multiplies the result; divide by its norm for a figure that
            compares between steps.
        has_aux: whether `loss_fn` also returns auxiliary data, for example the logits.

    Returns:
        The inner products, shaped like the losses, float32 or wider; with `has_aux`, (inner
        products, aux). Derivatives are computed in the dtypes that `loss_fn` computes in. Where
        `params` has leaves narrower than float32, v is scaled to length one before it is cast to
        theirs, and the result back, so that neither overflows. For complex leaves it is the real
        part of the inner product, as `optax.tree.vdot` of two gradients has it.

    Raises:
        ValueError: at trace time, naming the leaf, where `direction` differs from `params` in its
            leaves or a leaf of either is not floating point; and where the losses are one scalar,
            or not real.

    Example:
        >>> import jax.numpy as jnp, optax_bilevel
        >>> losses = lambda w, batch: (batch["x"] @ w - batch["y"]) ** 2
        >>> batch = {"x": jnp.eye(3), "y": jnp.array([1.0, 1.0, -1.0])}
        >>> optax_bilevel.example_alignment(losses, jnp.zeros(3), batch, -jnp.ones(3))
        Array([ 2.,  2., -2.], dtype=float32)
    """
    params = _tree.as_arrays(params)
    direction = _validate.direction(_tree.as_arrays(direction), params)

    def losses_and_aux(params: PyTree) -> tuple[jax.Array, Any]:
        losses, aux = loss_fn(params, batch) if has_aux else (loss_fn(params, batch), None)
        _validate.losses(losses)
        return losses, aux

    direction = jax.tree.map(jnp.conj, direction)  # jax.grad gives the conjugate of the gradient
    narrow = any(jnp.finfo(x.dtype).bits < 32 for x in jax.tree.leaves(params))
    length = _length(direction) if narrow else None

    def tangent(v: jax.Array, p: jax.Array) -> jax.Array:
        if length is not None:
            v = v.astype(_tree.accumulation_dtype(v.dtype))
            v = v / length.astype(jnp.finfo(v.dtype).dtype)
        return v.astype(p.dtype)

    tangents = jax.tree.map(tangent, direction, params)
    _, products, aux = jax.jvp(losses_and_aux, (params,), (tangents,), has_aux=True)
    products = products.astype(_tree.accumulation_dtype(products.dtype))
    if length is not None:
        products = products * length.astype(products.dtype)
    return (products, aux) if has_aux else products


def _length(direction: PyTree) -> jax.Array:
    """|v|, [], or 1 where v is zero."""
    grouping = _tree.resolve_groups(direction, None)
    length = jnp.sqrt(_tree.squared_norm(direction, grouping)[0])
    return jnp.where(length == 0, 1, length)
