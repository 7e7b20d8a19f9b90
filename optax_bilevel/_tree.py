"""Pytrees of gradients in, inner products per group out.

Products and sums are taken in float32 or wider whatever the gradients' dtype, and contractions in
the highest precision, or a TPU would multiply in bfloat16. A leaf is a stack [k, *shape], or
`Factored` where a gradient of a dense layer has not been formed.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_bilevel import _mesh, _rule
from optax_bilevel._factored import Factored

PyTree = Any
Groups = None | Literal["leaf"] | PyTree | Callable[[PyTree], PyTree]
Stack = jax.Array | Factored


# ------------------------------------------------------------------------------------- groups


class Grouping(NamedTuple):
    """Which group of parameters each leaf belongs to.

    Attributes:
        ids: one group index per leaf, in leaf order.
        num_groups: how many groups there are, at least 1.
        grouped: whether weights carry a groups axis for the user.
    """

    ids: tuple[int, ...]
    num_groups: int
    grouped: bool

    def present(self, weights: jax.Array) -> jax.Array:
        """[groups, k] as users see it: [k] without groups."""
        return weights if self.grouped else weights[0]


def resolve_groups(tree: PyTree, groups: Groups) -> Grouping:
    """One group index per leaf of `tree`.

    Args:
        tree: gradients or parameters.
        groups: None (one group), "leaf" (a group per leaf), or a pytree of hashable labels, the
            same as `tree` or a prefix of it, or a callable that makes one from `tree`. Groups are
            numbered in the order in which their labels first appear among the leaves.

    Raises:
        ValueError: where the labels do not fit the tree.
    """
    num_leaves = len(jax.tree.leaves(tree))
    if groups is None:
        return Grouping((0,) * num_leaves, 1, False)
    if isinstance(groups, str):
        return Grouping(tuple(range(num_leaves)), max(num_leaves, 1), True)
    labels = groups(tree) if callable(groups) else groups
    try:
        per_leaf: list[Hashable] = jax.tree.leaves(jax.tree.broadcast(labels, tree))
    except ValueError as error:
        raise ValueError(
            f"groups must be a pytree of labels like the gradients or a prefix of them: {error}"
        ) from error
    if len(per_leaf) != num_leaves:
        raise ValueError(
            f"groups gave {len(per_leaf)} labels for {num_leaves} gradient leaves; label every leaf"
        )
    index = {label: i for i, label in enumerate(dict.fromkeys(per_leaf))}
    return Grouping(tuple(index[x] for x in per_leaf), max(len(index), 1), True)


def _sum_by_group(per_leaf: list[jax.Array], grouping: Grouping) -> jax.Array:
    """Adds up per-leaf arrays of one shape within each group: [groups, *shape]."""
    dtype = functools.reduce(np.promote_types, (x.dtype for x in per_leaf))
    groups: list[list[jax.Array]] = [[] for _ in range(grouping.num_groups)]
    for group, x in zip(grouping.ids, per_leaf, strict=True):
        groups[group].append(x.astype(dtype))
    # One sum of a stack a group: so many additions one after the other compile slowly.
    return jnp.stack([jnp.sum(jnp.stack(members), axis=0) for members in groups])


# --------------------------------------------------------------------------------------- dtypes


def accumulation_dtype(dtype: Any) -> Any:
    """The dtype in which a leaf is summed: float32 or wider, complex where the leaf is."""
    # Not jnp.promote_types, which refuses bfloat16 and float32 under strict promotion.
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def products_dtype(tree: PyTree) -> Any:
    """The dtype of the inner products of gradients like `tree`: real, float32 or wider."""
    dtypes = (accumulation_dtype(x.dtype) for x in jax.tree.leaves(tree))
    widest = functools.reduce(np.promote_types, dtypes, jnp.dtype(jnp.float32))
    return jnp.finfo(widest).dtype


def as_arrays(tree: PyTree) -> PyTree:
    """The same with arrays for Python's floating-point numbers."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, float | complex) else x, tree)


def wide_zeros(tree: PyTree) -> PyTree:
    """Zeros like a tree of arrays, their sharding included, in the accumulation dtypes."""
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=accumulation_dtype(x.dtype)), tree)


def static_int(value: Any) -> int | None:
    """`value` as an int where it is known at trace time, None where it is traced."""
    return None if isinstance(value, Tracer) else int(value)


# ------------------------------------------------------------------------------------- products


def _along_first(x: jax.Array, like: jax.Array) -> jax.Array:
    """[k] -> [k, 1, ..., 1], to go with a stacked leaf."""
    return x.reshape((-1,) + (1,) * (like.ndim - 1))


def _contract(stack: jax.Array, other: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Re⟨·,·⟩ of every stacked entry with `other`, contracting its `axes`: [k] or [k, k]."""
    dtype = np.promote_types(accumulation_dtype(stack.dtype), accumulation_dtype(other.dtype))
    mesh = _mesh.explicit_mesh(stack)
    result = jax.lax.dot_general(
        jnp.conj(stack.astype(dtype)),
        other.astype(dtype),
        ((tuple(range(1, stack.ndim)), axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        # Over sharded axes the result's sharding has to be said; small as it is: replicated.
        out_sharding=None if mesh is None else _mesh.replicated(mesh, 1 + other.ndim - len(axes)),
    )
    return jnp.real(result)


def _square_sums(stack: Stack) -> jax.Array:
    """|·|² of every stacked entry, [k]."""
    dtype = accumulation_dtype(stack.dtype)
    if isinstance(stack, Factored):
        return stack.square_sums(dtype)
    stack = stack.astype(dtype)
    parts = [stack]
    if jnp.issubdtype(stack.dtype, jnp.complexfloating):
        parts = [jnp.real(stack), jnp.imag(stack)]
    squares = functools.reduce(jnp.add, (jnp.square(x) for x in parts))
    return _mesh.replicate(jnp.sum(squares, axis=tuple(range(1, stack.ndim))))


def _weighted(stack: Stack, omega: jax.Array, rows: range | None = None) -> jax.Array:
    """Σ_i ω_i g_i of one leaf in the accumulation dtype, [*shape]; ω [k], 0 leaves out NaN, too.

    Args:
        stack: [k, *shape].
        omega: [k].
        rows: which of the k are read; the others' weight is known to be 0.
    """
    omega = omega.astype(accumulation_dtype(stack.dtype))
    if isinstance(stack, Factored):
        return stack.weighted_sum(omega)
    if _mesh.first_axis_is_sharded(stack):
        weight = _along_first(omega, stack)
        return jnp.sum(jnp.where(weight == 0, 0, weight * stack.astype(weight.dtype)), axis=0)
    # One by one: XLA's CPU backend reduces over a leading axis fifty times slower than it adds.
    parts = (
        jnp.where(omega[i] == 0, 0, omega[i] * stack[i].astype(omega.dtype))
        for i in (range(stack.shape[0]) if rows is None else rows)
    )
    return functools.reduce(jnp.add, parts)


def validation_gradient(grads: PyTree, num_validation: Any) -> PyTree:
    """Σ_{j∈V} g_j over the first slots of a stack, in the accumulation dtype; leaves [*shape]."""
    static = static_int(num_validation)

    def leaf_sum(g: Stack) -> jax.Array:
        dtype = jnp.finfo(accumulation_dtype(g.dtype)).dtype
        is_validation = jnp.arange(g.shape[0]) < num_validation
        rows = None if static is None else range(static)
        return _weighted(g, is_validation.astype(dtype), rows)

    return jax.tree.map(leaf_sum, grads)


def dots_with(grads: PyTree, validation: PyTree, grouping: Grouping) -> jax.Array:
    """⟨v, g_i⟩ of gradients [k, *shape] with v [*shape]: [groups, k], float32 or wider."""
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(validation), strict=True)
    products = [
        g.dots_with(v, accumulation_dtype(g.dtype))
        if isinstance(g, Factored)
        else _contract(g, v, tuple(range(v.ndim)))
        for g, v in pairs
    ]
    return _sum_by_group(products, grouping)


def squared_norms(grads: PyTree, grouping: Grouping) -> jax.Array:
    """|g_i|² of every mini-batch gradient: [groups, k], float32 or wider."""
    return _sum_by_group([_square_sums(g) for g in jax.tree.leaves(grads)], grouping)


def squared_norm(tree: PyTree, grouping: Grouping) -> jax.Array:
    """|g|² of one gradient, leaves [*shape]: [groups], float32 or wider."""
    return squared_norms(jax.tree.map(lambda x: x[None], tree), grouping)[:, 0]


def stack_products(
    grads: PyTree, grouping: Grouping, num_validation: Any, *, with_gram: bool
) -> _rule.Products:
    """All inner products that the rule needs of a stack of k gradients.

    Args:
        grads: leaves [k, *shape], at least one leaf; `Factored` only without the Gram matrix.
        grouping: the group of every leaf.
        num_validation: the first slots that form V; an int, or traced.
        with_gram: compute the whole Gram matrix (eq. 8) and read the others off it.
    """

    def products(g: Stack) -> tuple[jax.Array, jax.Array]:
        if isinstance(g, Factored):
            dtype = accumulation_dtype(g.dtype)
            return g.dots_with_first(num_validation, dtype), _square_sums(g)
        v = validation_gradient(g, num_validation)
        return _contract(g, v, tuple(range(v.ndim))), _square_sums(g)

    leaves = jax.tree.leaves(grads)
    gram = None
    if with_gram:
        gram = _sum_by_group([_contract(g, g, tuple(range(1, g.ndim))) for g in leaves], grouping)
        k = gram.shape[-1]
        is_validation = jnp.arange(k)[None] < num_validation
        # `where`, not products: a NaN of one mini-batch stays in its own row and column.
        dots = jnp.sum(jnp.where(is_validation[:, None], gram, 0), axis=-1)
        sq_norms = jnp.sum(jnp.where(jnp.eye(k, dtype=bool)[None], gram, 0), axis=-1)
    else:
        parts = zip(*map(products, leaves), strict=True)
        dots, sq_norms = (_sum_by_group(list(part), grouping) for part in parts)
    # |g_v|² = Σ_{j∈V} ⟨g_v, g_j⟩
    of_validation = jnp.arange(dots.shape[-1])[None] < num_validation
    validation_sq_norm = jnp.maximum(jnp.sum(jnp.where(of_validation, dots, 0), axis=-1), 0)
    return _rule.Products(dots, sq_norms, validation_sq_norm, gram)


def weighted_sum(
    grads: PyTree, weights: jax.Array, grouping: Grouping, *, held_out: Any = 0
) -> PyTree:
    """Σ_i ω_i g_i over the leading axis, in the accumulation dtype.

    A mini-batch of weight 0 takes no part, even where its gradient is NaN.

    Args:
        grads: leaves [k, *shape]; the result's are [*shape].
        weights: [groups, k].
        grouping: the group of every leaf.
        held_out: of how many leading mini-batches the weight is known to be 0; an int, or traced.
    """
    leaves, treedef = jax.tree.flatten(grads)
    rows = range(static_int(held_out) or 0, weights.shape[-1])
    return treedef.unflatten(
        [_weighted(g, weights[i], rows) for g, i in zip(leaves, grouping.ids, strict=True)]
    )


def scale_and_cast(tree: PyTree, scale: jax.Array, grouping: Grouping, like: PyTree) -> PyTree:
    """Each leaf times its group's scale [groups], where 0 gives zeros, in the dtype of `like`."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(
        [
            jnp.where(scale[i] == 0, 0, x * scale[i].astype(x.dtype)).astype(target.dtype)
            for x, i, target in zip(leaves, grouping.ids, jax.tree.leaves(like), strict=True)
        ]
    )
