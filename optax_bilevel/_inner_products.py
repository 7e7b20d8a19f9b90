"""Pytrees of gradients in, inner products per group out.

Precision, dtypes, complex leaves and sharded axes are dealt with here and nowhere else. Products
and sums are taken in float32 or wider whatever the gradients' dtype, and contractions in the
highest precision, or a TPU would multiply in bfloat16.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_bilevel import _rule
from optax_bilevel._factors import Factored

PyTree = Any
Groups = None | str | PyTree | Callable[[PyTree], PyTree]
AxisName = Any  # a mesh or pmap axis name, or a tuple of them


# ---------------------------------------------------------------- what came, and in what shape


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def path_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf in an error message."""
    return jax.tree_util.keystr(path) or "(the whole tree)"


def check_masked(tree: PyTree, allow_masked: bool) -> None:
    """Raises ValueError at the first `optax.MaskedNode` unless they are allowed."""
    if allow_masked:
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_masked):
        if _is_masked(leaf):
            raise ValueError(
                f"gradient leaf {path_name(path)} is hidden by optax.masked or optax.partition and "
                "would stay stacked. Put masks after the reweighting, which belongs first in the "
                "chain: optax.chain(bilevel_reweight(...), optax.masked(...)). Inside a partition "
                "whose other labels reduce their own leaves, pass allow_masked=True"
            )


def check_inexact(tree: PyTree, what: str = "gradient") -> None:
    """Raises ValueError where a leaf is neither real nor complex floating point."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"{what} leaf {path_name(path)}: expected a floating-point array, got "
                f"{dtype or type(leaf).__name__}"
            )


def static_int(value: Any) -> int | None:
    """`value` as an int where it is known at trace time, None where it is traced."""
    return None if isinstance(value, Tracer) else int(value)


def leading_axis(
    tree: PyTree, num_validation: Any, *, expected: int | None = None, what: str = "gradient"
) -> int:
    """The number of mini-batches k along the leading axis of every leaf; 0 for an empty tree.

    Args:
        tree: leaves [k, ...].
        num_validation: number of validation slots; checked where it is concrete.
        expected: k where it is known beforehand.
        what: what a leaf is called in messages.

    Raises:
        ValueError: naming the leaf, what was expected and what came.
    """
    source = "num_batches"
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        shape = tuple(jnp.shape(leaf))
        if not shape:
            raise ValueError(
                f"{what} leaf {path_name(path)}: expected a leading axis of k mini-batches, got a "
                "scalar"
            )
        if expected is None:
            expected, source = shape[0], f"leaf {path_name(path)}"
        elif shape[0] != expected:
            raise ValueError(
                f"{what} leaf {path_name(path)}: expected a leading axis of k = {expected} "
                f"mini-batches (from {source}), got shape {shape}"
            )
    held_out = static_int(num_validation)
    if expected is not None and held_out is not None and expected <= held_out:
        beside = f" with num_validation = {held_out}" if held_out else ""
        raise ValueError(
            f"k = {expected} mini-batches{beside} leave none to train on: k must be at least "
            f"{held_out + 1}"
        )
    return expected or 0


def check_stack(
    grads: PyTree,
    params: PyTree | None,
    num_validation: Any,
    *,
    num_batches: Any = None,
    allow_masked: bool = False,
) -> int:
    """Checks k stacked gradients, against the parameters where they are given; returns k.

    Raises:
        ValueError: naming the leaf, what was expected and what came.
    """
    check_masked(grads, allow_masked)
    check_inexact(grads)
    if params is not None:
        _check_against_params(grads, params)
    expected = None if num_batches is None else static_int(num_batches)
    return leading_axis(grads, num_validation, expected=expected)


def check_like(grads: PyTree, params: PyTree, remedy: str) -> None:
    """Checks the gradients of one mini-batch against trees shaped like the parameters.

    Raises:
        ValueError: naming the leaf, what was expected and what came.
    """
    check_masked(grads, allow_masked=False)
    check_inexact(grads)
    for path, leaf, shape in _beside_params(grads, params):
        if tuple(leaf.shape) != shape:
            raise ValueError(
                f"gradient leaf {path_name(path)}: expected the parameter's shape {shape}, got "
                f"{tuple(leaf.shape)}. {remedy}"
            )


def check_average(average: PyTree, shapes: PyTree, name: str, remedy: str) -> None:
    """Checks an average of gradients against arrays, or abstract ones, of the gradients' shapes.

    Raises:
        ValueError: naming the leaf, what was expected and what came, and the remedy.
    """
    structures = jax.tree.structure(average), jax.tree.structure(shapes)
    if structures[0] != structures[1]:
        raise ValueError(
            f"{name} and the gradients differ in structure, {structures[0]} and {structures[1]}: "
            f"{remedy}"
        )
    expected = jax.tree_util.tree_leaves_with_path(shapes)
    for (path, shape), leaf in zip(expected, jax.tree.leaves(average), strict=True):
        dtype = accumulation_dtype(shape.dtype)
        if tuple(leaf.shape) != tuple(shape.shape) or leaf.dtype != dtype:
            raise ValueError(
                f"{name} leaf {path_name(path)}: expected shape {tuple(shape.shape)} of {dtype}, "
                f"got {tuple(leaf.shape)} of {leaf.dtype}: {remedy}"
            )


def _beside_params(
    grads: PyTree, params: PyTree
) -> list[tuple[tuple[Any, ...], Any, tuple[int, ...]]]:
    """(path, gradient leaf, shape of the parameter) of every leaf that has both."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(
        grads, is_leaf=lambda x: x is None or _is_masked(x)
    )
    try:
        matching = treedef.flatten_up_to(params)
    except (ValueError, TypeError) as error:
        raise ValueError(f"gradients and params differ in structure: {error}") from error
    return [
        (path, leaf, tuple(param.shape))
        for (path, leaf), param in zip(leaves, matching, strict=True)
        if leaf is not None and hasattr(param, "shape")
    ]


def _check_against_params(grads: PyTree, params: PyTree) -> None:
    for path, leaf, shape in _beside_params(grads, params):
        if jnp.shape(leaf)[1:] != shape or jnp.ndim(leaf) != len(shape) + 1:
            expected = f"({', '.join(map(str, ('k', *shape)))})"
            raise ValueError(
                f"gradient leaf {path_name(path)}: expected shape {expected} for a parameter of "
                f"shape {shape}, got {jnp.shape(leaf)}. Stack the k mini-batch gradients along a "
                "new leading axis, e.g. jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, "
                "batches). bilevel_reweight belongs first in the chain; wrappers that expect "
                "gradients of the parameters' shape, such as optax.MultiSteps, go after it"
            )


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


def check_groups(groups: Groups) -> None:
    """Raises ValueError for a `groups` that can never name groups."""
    if isinstance(groups, str) and groups != "leaf":
        raise ValueError(
            f'unknown groups {groups!r}; known: None, "leaf", a pytree of labels, or a callable '
            'that makes one (which optax.inject_hyperparams leaves alone with static_args="groups")'
        )
    if isinstance(groups, jax.Array):
        raise ValueError(
            "groups is an array; a callable under optax.inject_hyperparams needs "
            'static_args="groups"'
        )


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
        per_leaf = jax.tree.leaves(jax.tree.broadcast(labels, tree))
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
    sums = [jnp.zeros_like(per_leaf[0], dtype)] * grouping.num_groups
    for group, x in zip(grouping.ids, per_leaf, strict=True):
        sums[group] = sums[group] + x.astype(dtype)
    return jnp.stack(sums)


# ------------------------------------------------------------------------- dtypes and sharding


def accumulation_dtype(dtype: Any) -> Any:
    """The dtype in which a leaf is summed: float32 or wider, complex where the leaf is."""
    # Not jnp.promote_types, which refuses bfloat16 and float32 under strict promotion.
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def products_dtype(tree: PyTree) -> Any:
    """The dtype of the inner products of gradients like `tree`: real, float32 or wider."""
    dtypes = (accumulation_dtype(x.dtype) for x in jax.tree.leaves(tree))
    widest = functools.reduce(np.promote_types, dtypes, jnp.dtype(jnp.float32))
    return jnp.finfo(widest).dtype


def wide_zeros(tree: PyTree) -> PyTree:
    """Zeros like a tree of arrays, their sharding included, in the accumulation dtypes."""
    return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=accumulation_dtype(x.dtype)), tree)


def zeros_of(x: Any) -> jax.Array:
    """Zeros like an abstract value, its sharding included."""
    sharding = getattr(x, "sharding", None)
    return jnp.zeros(x.shape, x.dtype, device=sharding)


def _explicit_mesh(x: jax.Array) -> Any:
    mesh = jax.typeof(x).sharding.mesh
    return mesh if AxisType.Explicit in mesh.axis_types else None


def is_explicit(tree: PyTree) -> bool:
    """Whether a leaf lives on a mesh with Explicit axes."""
    return any(_explicit_mesh(x) is not None for x in jax.tree.leaves(tree))


def _replicated(mesh: Any, ndim: int) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*(None,) * ndim))


def _replicate(x: jax.Array) -> jax.Array:
    """Small results are the same on all devices; on Explicit meshes that has to be said."""
    mesh = _explicit_mesh(x)
    return x if mesh is None else jax.sharding.reshard(x, _replicated(mesh, x.ndim))


def replicate_like(x: jax.Array, tree: PyTree) -> jax.Array:
    """`x` on the Explicit mesh on which `tree` lives, so that a state's types never change."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and (mesh := _explicit_mesh(leaf)) is not None:
            if isinstance(leaf, Tracer):
                return jax.sharding.reshard(x, _replicated(mesh, x.ndim))
            assert isinstance(leaf.sharding, NamedSharding)
            return jax.device_put(x, _replicated(leaf.sharding.mesh, x.ndim))
    return x


def probe(x: jax.Array) -> jax.Array:
    """A scalar made from a few entries of a non-empty `x`: the first along unsharded axes."""
    sharded = jax.typeof(x).sharding.spec  # names only axes of Explicit meshes, which have no [0]
    return jnp.sum(x[tuple(0 if axis is None else slice(None) for axis in sharded)])


def _has_explicit_leading_axis(x: jax.Array) -> bool:
    return _explicit_mesh(x) is not None and jax.typeof(x).sharding.spec[0] is not None


def _along_first(x: jax.Array, like: jax.Array) -> jax.Array:
    """[k] -> [k, 1, ..., 1], to go with a stacked leaf."""
    return x.reshape((-1,) + (1,) * (like.ndim - 1))


def _contract(stack: jax.Array, other: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Re⟨·,·⟩ of every stacked entry with `other`, contracting its `axes`: [k] or [k, k]."""
    dtype = np.promote_types(accumulation_dtype(stack.dtype), accumulation_dtype(other.dtype))
    if stack.dtype != dtype and len(axes) == other.ndim:
        # A contraction would first write the stack out in the wider dtype.
        other = jax.lax.optimization_barrier(other.astype(dtype))
        products = stack.astype(dtype) * other[None]
        return _replicate(jnp.sum(products, axis=tuple(range(1, stack.ndim))))
    mesh = _explicit_mesh(stack)
    result = jax.lax.dot_general(
        jnp.conj(stack.astype(dtype)),
        other.astype(dtype),
        ((tuple(range(1, stack.ndim)), axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        # Over sharded axes the result's sharding has to be said; small as it is: replicated.
        out_sharding=None if mesh is None else _replicated(mesh, 1 + other.ndim - len(axes)),
    )
    return jnp.real(result)


def _unshared(stack: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """All of them, such that XLA does not see that others read `stack`, too.

    A conversion to float32 with several readers is written out on CPU instead of being fused into
    each, which costs several passes over memory. `others`, which are to be used with `stack`, tell
    one use apart from another.
    """
    if stack.dtype == accumulation_dtype(stack.dtype):
        return stack, *others
    return jax.lax.optimization_barrier((stack, *others))


def _add_up(stack: jax.Array, omega: jax.Array, rows: range) -> jax.Array:
    """Σ_i ω_i g_i over some rows of a stack [k, *shape], one by one: [*shape].

    XLA's CPU backend reduces over a leading axis tens of times slower than it adds.

    Args:
        stack: [k, *shape].
        omega: [k], of the dtype to sum in; 0 leaves out NaN, too.
        rows: which of the k; at least one.
    """

    def row(i: int) -> jax.Array:
        # For more than 15 readers XLA writes out what they read, here the stack in float32.
        x, weight = _unshared(stack, omega[i])
        # A slice keeps its axis, or XLA goes through it in another, slower order.
        return jnp.where(weight == 0, 0, weight * x[i : i + 1].astype(omega.dtype))

    return functools.reduce(jnp.add, map(row, rows))[0]


def _square_sums(stack: jax.Array | Factored) -> jax.Array:
    """|·|² of every stacked entry, [k]; on CPU several times faster than as a contraction."""
    if isinstance(stack, Factored):
        return _factored_square_sums(stack)
    (stack,) = _unshared(stack)
    stack = stack.astype(accumulation_dtype(stack.dtype))
    parts = [stack]
    if jnp.issubdtype(stack.dtype, jnp.complexfloating):
        parts = [jnp.real(stack), jnp.imag(stack)]
    squares = functools.reduce(jnp.add, (jnp.square(x) for x in parts))
    return _replicate(jnp.sum(squares, axis=tuple(range(1, stack.ndim))))


# ------------------------------------------------- products of gradients that are products, XᵀΔ


def _matmul(subscripts: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


def _rows(g: Factored) -> tuple[jax.Array, jax.Array]:
    """X [k, c, m] and Δ [k, c, n] in the accumulation dtype."""
    return g.rows(accumulation_dtype(g.dtype))


def _factored_square_sums(g: Factored) -> jax.Array:
    """|XᵀΔ|² = Σ (X Xᵀ) ∘ (Δ Δᵀ) of every mini-batch, [k] (Goodfellow 2015, arXiv:1510.01799)."""
    left, right = (_matmul("kcm,kdm->kcd", x, x) for x in _rows(g))
    return jnp.maximum(jnp.sum(left * right, axis=(1, 2)), 0)


def _factored_dots(g: Factored, v: jax.Array | Factored) -> jax.Array:
    """⟨v, XᵀΔ⟩ = Σ (X v) ∘ Δ of every mini-batch with v [*shape], or with a sum: [k]."""
    left, right = _rows(g)
    if isinstance(v, Factored):
        pairs = zip((left, right), _rows(v), strict=True)
        left, right = (_matmul("kcm,dm->kcd", x, y[0]) for x, y in pairs)
    else:
        left = _matmul("kcm,mn->kcn", left, g.as_matrix(v).astype(left.dtype))
    return jnp.sum(left * right, axis=(1, 2))


def _factored_dots_among(g: Factored, count: int) -> jax.Array:
    """⟨Σ_{j<count} X_jᵀΔ_j, XᵀΔ⟩ of every mini-batch: [k]."""
    left, right = (_matmul("jcm,kdm->kjcd", x[:count], x) for x in _rows(g))
    return jnp.sum(left * right, axis=(1, 2, 3))


def _factored_sum(g: Factored, omega: jax.Array) -> Any:
    """Σ_i ω_i X_iᵀΔ_i, one product as on the whole batch; ω [k], 0 leaves out."""
    total = g.summed(omega.astype(accumulation_dtype(g.dtype)))
    return total if g.kept else formed(total)


def formed(x: Any) -> jax.Array:
    """A sum as an array [*shape]."""
    return x.formed(accumulation_dtype(x.dtype)) if isinstance(x, Factored) else x


# ---------------------------------------------------------------- mapped axes (shard_map, pmap)


def axes_of(axis_name: AxisName) -> tuple[Any, ...]:
    """One axis name or several, as a tuple."""
    return tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)


def is_tracked(axis: Any) -> bool:
    """Whether types say what differs along the axis; not in pmap, nor with check_vma=False."""
    return axis in varying_axes(jax.lax.axis_index(axis))


def varying_axes(x: jax.Array) -> frozenset[Any]:
    """The mapped axes along which `x` is known to differ."""
    return jax.typeof(x).manual_axis_type.varying


def vary(tree: PyTree, axis_name: AxisName) -> PyTree:
    """The same values, as each device's own: so are then gradients with respect to them."""
    axes = tuple(axis for axis in axes_of(axis_name) if is_tracked(axis))

    def leaf(x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        missing = tuple(axis for axis in axes if axis not in varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(leaf, tree)


def check_varying(grads: PyTree, axis_name: AxisName) -> None:
    """Raises ValueError where shard_map's autodiff has already summed a gradient over devices."""
    for axis in axes_of(axis_name):
        if not is_tracked(axis):
            continue  # then nothing is summed either
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
            if axis not in varying_axes(leaf):
                raise ValueError(
                    f"gradient leaf {path_name(path)} is the same on all devices "
                    f"of axis {axis!r}: inside jax.shard_map, gradients with respect to replicated "
                    "parameters are summed over the devices. Differentiate with respect to "
                    f'jax.lax.pcast(params, {axis!r}, to="varying") instead'
                )


# ----------------------------------------------------------------------------------- products


def validation_gradient(grads: PyTree, num_validation: Any) -> PyTree:
    """Σ_{j∈V} g_j over the first slots of a stack, in the accumulation dtype; leaves [*shape]."""
    static = static_int(num_validation)

    def leaf_sum(g: jax.Array | Factored) -> jax.Array:
        dtype = accumulation_dtype(g.dtype)
        if isinstance(g, Factored):
            return _factored_sum(g, (jnp.arange(g.count) < num_validation).astype(dtype))
        if static is not None and not _has_explicit_leading_axis(g):
            return jnp.sum(g[:static].astype(dtype), axis=0) if static > 1 else g[0].astype(dtype)
        # A sharded or traced number of slots cannot be sliced: sum under a mask.
        mask = _along_first(jnp.arange(g.shape[0]) < num_validation, g)
        return jnp.sum(jnp.where(mask, g.astype(dtype), 0), axis=0)

    return jax.tree.map(leaf_sum, grads)


def dots_with(grads: PyTree, validation: PyTree, grouping: Grouping) -> jax.Array:
    """⟨v, g_i⟩ of every mini-batch gradient with a validation gradient v.

    Args:
        grads: leaves [k, *shape].
        validation: leaves [*shape].
        grouping: the group of every leaf.

    Returns:
        [groups, k], float32 or wider.
    """
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(validation), strict=True)
    products = [
        _factored_dots(g, v) if isinstance(g, Factored) else _contract(g, v, tuple(range(v.ndim)))
        for g, v in pairs
    ]
    return _sum_by_group(products, grouping)


def squared_norms(grads: PyTree, grouping: Grouping) -> jax.Array:
    """|g_i|² of every mini-batch gradient: [groups, k], float32 or wider."""
    return _sum_by_group([_square_sums(g) for g in jax.tree.leaves(grads)], grouping)


def squared_norm(tree: PyTree, grouping: Grouping) -> jax.Array:
    """|g|² of one gradient, leaves [*shape]: [groups], float32 or wider."""
    one = jax.tree.map(lambda x: x if isinstance(x, Factored) else x[None], tree)
    return squared_norms(one, grouping)[:, 0]


# ------------------------------------------------ products of large leaves on one CPU device

# Entries of a stack that a Gram matrix is made of at a time: 4 MiB in float32, which caches hold.
_CHUNK = 1 << 20
# A pass of the loop over a large leaf goes through so many streams of every row at once, in blocks
# of so many lines of so many entries: each entry of a line has its own sum over lines and streams,
# and about _SUMS of such sums lie side by side. A stream is read in order, which the processor
# foresees, and a sum is written once for 60 entries: written sooner it costs as much as reading
# where the cores share no cache.
_STREAMS, _LINES, _LINE = 6, 10, 16
_SUMS = 3 << 16
# From more slots than these v is added up beforehand, in a buffer of its own.
_MOST_SLOTS = 4


def _columns(g: jax.Array, start: Any, width: int, row: int | None = None) -> jax.Array:
    """`width` columns of g [rows, n], or of one row, [1, n], in the accumulation dtype.

    XLA's CPU backend slices no bfloat16, and in a loop it would first write all of `g` out in
    float32: those are sliced and converted as bits.
    """
    dtype, as_bits = accumulation_dtype(g.dtype), g.dtype == jnp.bfloat16
    if as_bits:
        # Without the barrier the bits, which do not change in the loop, are written out before it.
        g, start = jax.lax.optimization_barrier((g, start))
        g = jax.lax.bitcast_convert_type(g, jnp.uint16)
    first, rows = (0, g.shape[0]) if row is None else (row, 1)
    columns = jax.lax.dynamic_slice(g, (first, start), (rows, width))
    if as_bits:
        return jax.lax.bitcast_convert_type(columns.astype(jnp.uint32) << 16, dtype)
    return columns.astype(dtype)


def _gram_by_chunks(g: jax.Array) -> jax.Array:
    """Re⟨g_i, g_j⟩ of the rows of g [k, n]: [k, k]; XLA would write a bfloat16 `g` out before."""
    width = max(_CHUNK // g.shape[0], 1)

    def chunk(start: Any, width: int) -> jax.Array:
        # Converted once for both readers, or each would convert anew.
        columns = jax.lax.optimization_barrier(_columns(g, start, width))
        return _contract(columns, columns, (1,))

    n = g.shape[1]
    total = jax.lax.fori_loop(
        1, n // width, lambda i, total: total + chunk(i * width, width), chunk(0, width)
    )
    return total + chunk(n - n % width, n % width) if n % width else total


def _dots_and_norms_by_streams(
    g: jax.Array, num_validation: Any, past: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Re⟨v, g_i⟩ and |g_i|² of the rows of g [k, n], [k] each.

    A loop adds up products by columns, which XLA makes one vectorised pass over memory of;
    reductions of the same are passes over memory each, on one core or with a copy.

    Args:
        g: [k, n].
        num_validation: an int, or traced: the first rows, whose sum is v.
        past: v itself, [1, n].
    """
    k, n = g.shape
    slots = 0 if past is not None else static_int(num_validation)

    def added_up(g: jax.Array) -> jax.Array:
        is_validation = (jnp.arange(k) < num_validation).astype(accumulation_dtype(g.dtype))
        return _add_up(g, is_validation, range(slots or k))[None]

    if slots is None:  # as under optax.inject_hyperparams, most often 1
        return jax.lax.cond(
            num_validation == 1,
            lambda g: _dots_and_norms_by_streams(g, 1),
            lambda g: _dots_and_norms_by_streams(g, 0, added_up(g)),
            g,
        )
    if slots > _MOST_SLOTS:
        past = added_up(g)
    # The more rows make v, the sooner the loop over lines is too long for LLVM to unroll.
    lines = min(_LINES, 24 // (1 + slots)) if past is None else _LINES
    passes = n // (max(_SUMS // k, _LINE) * _STREAMS * lines)
    passes = passes if passes > 2 else 1  # of two passes XLA makes no loop, and runs both slower
    blocks = n // (passes * _STREAMS * lines * _LINE)
    stream = blocks * lines * _LINE

    def validation(start: Any, width: int) -> jax.Array:
        if past is not None:
            return _columns(past, start, width)
        # Each row sliced from `g`: a slice of a slice is not vectorised.
        return functools.reduce(jnp.add, (_columns(g, start, width, row) for row in range(slots)))

    def products(start: Any, blocks: int, lines: int, line: int) -> jax.Array:
        """Of the columns from `start`, summed over the lines of a block: [k, blocks, line]."""
        width = blocks * lines * line
        x, v = _columns(g, start, width), validation(start, width)
        dot, square = (jnp.real(jnp.conj(a) * x).reshape(k, blocks, lines, line) for a in (v, x))
        # One complex array: XLA's CPU backend would go over `g` once for each of two.
        return jnp.sum(jax.lax.complex(dot, square), axis=2)

    def one_pass(i: Any) -> jax.Array:
        starts = ((i * _STREAMS + j) * stream for j in range(_STREAMS))
        return functools.reduce(
            jnp.add, (products(start, blocks, lines, _LINE) for start in starts)
        )

    parts = []
    if blocks:
        parts.append(jax.lax.fori_loop(1, passes, lambda i, x: x + one_pass(i), one_pass(0)))
    if left := n - passes * _STREAMS * stream:
        parts.append(products(n - left, 1, 1, left))
    total = functools.reduce(jnp.add, (jnp.sum(x, axis=(1, 2)) for x in parts))
    return jnp.real(total), jnp.imag(total)


def stack_products(
    grads: PyTree,
    grouping: Grouping,
    num_validation: Any,
    *,
    with_gram: bool,
    past: PyTree | None = None,
) -> _rule.Products:
    """All inner products that the rule needs of a stack of k gradients.

    Args:
        grads: leaves [k, *shape], at least one leaf; `Factored` only with slots for validation,
            an int of them, and without the Gram matrix.
        grouping: the group of every leaf.
        num_validation: the first slots that form V; an int, or traced.
        with_gram: compute the whole Gram matrix (eq. 8) and read the others off it.
        past: the validation gradient, leaves [*shape], where no slots form it.
    """
    all_in_gram = with_gram and past is None

    def products(g: jax.Array, p: jax.Array | None = None) -> tuple[jax.Array, ...]:
        gram = (_contract(g, g, tuple(range(1, g.ndim))),) if with_gram else ()
        if all_in_gram:
            return gram
        v = validation_gradient(g, num_validation) if p is None else p[0]
        dots = _contract(g, v, tuple(range(v.ndim)))
        return dots, _square_sums(g), _square_sums(v[None]), *gram

    def on_cpu(*leaves: jax.Array) -> tuple[jax.Array, ...]:
        g, *p = (x.reshape(x.shape[0], -1) for x in leaves)
        gram = (_gram_by_chunks(g),) if with_gram else ()
        if all_in_gram:
            return gram
        dots, sq_norms = _dots_and_norms_by_streams(g, num_validation, *p)
        return dots, sq_norms, _square_sums(p[0]) if p else sum_of_validation(dots), *gram

    def of_leaf(g: jax.Array | Factored, *p: jax.Array) -> tuple[jax.Array, ...]:
        if isinstance(g, Factored):
            return factored(g)
        # Slices across shards would be gathered: with several devices XLA divides the work itself.
        if g.size < 2 * _CHUNK or jax.device_count() > 1:
            return products(g, *p)
        return jax.lax.platform_dependent(g, *p, cpu=on_cpu, default=products)

    def factored(g: Factored) -> tuple[jax.Array, ...]:
        dots = _factored_dots_among(g, num_validation)
        return dots, _square_sums(g), sum_of_validation(dots)

    def sum_of_validation(dots: jax.Array) -> jax.Array:
        """|v|² = Σ_{j∈V} ⟨v, g_j⟩, [..., k] -> [..., 1].

        `where`, not products: a NaN of one mini-batch stays its own.
        """
        is_validation = jnp.arange(dots.shape[-1]) < num_validation
        total = jnp.sum(jnp.where(is_validation, dots, 0), axis=-1, keepdims=True)
        return jnp.maximum(total, 0)

    stacks = jax.tree.leaves(grads)
    pasts = [(p[None],) for p in jax.tree.leaves(past)] if past is not None else [()] * len(stacks)
    parts = [of_leaf(g, *p) for g, p in zip(stacks, pasts, strict=True)]
    sums = [_sum_by_group(list(part), grouping) for part in zip(*parts, strict=True)]
    if not all_in_gram:
        dots, sq_norms, validation_sq_norm, *gram = sums
        return _rule.Products(dots, sq_norms, validation_sq_norm[:, 0], *gram)
    (gram,) = sums
    k = gram.shape[-1]
    is_validation = jnp.arange(k)[None] < num_validation
    # `where`, not products: a NaN of one mini-batch stays in its own row and column.
    dots = jnp.sum(jnp.where(is_validation[:, None], gram, 0), axis=-1)
    sq_norms = jnp.sum(jnp.where(jnp.eye(k, dtype=bool)[None], gram, 0), axis=-1)
    return _rule.Products(dots, sq_norms, sum_of_validation(dots)[:, 0], gram)


def weighted_sum(
    grads: PyTree, weights: jax.Array, grouping: Grouping, *, held_out: Any = 0
) -> PyTree:
    """Σ_i ω_i g_i over the leading axis, in the accumulation dtype.

    A mini-batch of weight 0 takes no part, even where its gradient is NaN.

    Args:
        grads: leaves [k, *shape].
        weights: [groups, k].
        grouping: the group of every leaf.
        held_out: of how many leading mini-batches the weight is known to be 0; an int, or traced.

    Returns:
        leaves [*shape].
    """
    leaves, treedef = jax.tree.flatten(grads)

    def reduce(g: jax.Array, omega: jax.Array) -> jax.Array:
        g, omega = _unshared(g, omega)
        omega = _along_first(omega, g)
        return jnp.sum(jnp.where(omega == 0, 0, omega * g.astype(omega.dtype)), axis=0)

    def add_up(g: jax.Array, omega: jax.Array) -> jax.Array:
        return _add_up(g, omega, range(static_int(held_out) or 0, g.shape[0]))

    def leaf_sum(g: jax.Array | Factored, omega: jax.Array) -> jax.Array:
        omega = omega.astype(accumulation_dtype(g.dtype))
        if isinstance(g, Factored):
            return _factored_sum(g, omega)
        if g.shape[0] == 1 or _has_explicit_leading_axis(g):
            return reduce(g, omega)
        return jax.lax.platform_dependent(g, omega, cpu=add_up, default=reduce)

    return treedef.unflatten(
        [leaf_sum(g, weights[i]) for g, i in zip(leaves, grouping.ids, strict=True)]
    )


def finite_sum(grads: PyTree, sq_norms: jax.Array, grouping: Grouping) -> PyTree:
    """Σ_i g_i over the mini-batches without NaN and Inf, in the accumulation dtype.

    Args:
        grads: leaves [k, *shape].
        sq_norms: |g_i|², [groups, k].
        grouping: the group of every leaf.

    Returns:
        leaves [*shape].
    """
    kept = jnp.broadcast_to(_rule.finite(sq_norms).astype(sq_norms.dtype), sq_norms.shape)
    return weighted_sum(grads, kept, grouping)


def move(average: PyTree, total: PyTree, count: jax.Array, rate: jax.Array) -> PyTree:
    """Averages moved towards a mean, a + rate · (total/count - a), leaves [*shape]."""

    def leaf(a: jax.Array, x: jax.Array) -> jax.Array:
        return a + rate.astype(a.dtype) * (x / jnp.maximum(count, 1).astype(x.dtype) - a)

    return jax.tree.map(leaf, average, total)


def blend(average: PyTree, new: PyTree, decay: Any) -> PyTree:
    """The moving average d·a + (1-d)·x of leaves [*shape], in the dtypes of `average`."""

    def leaf(a: jax.Array, x: jax.Array) -> jax.Array:
        d = jnp.asarray(decay, jnp.finfo(a.dtype).dtype)
        return d.astype(a.dtype) * a + (1 - d).astype(a.dtype) * x.astype(a.dtype)

    return jax.tree.map(leaf, average, new)


def scaled(tree: PyTree, factor: jax.Array) -> PyTree:
    """Every leaf times a scalar, float32 or wider in between, in its own dtype."""

    def leaf(x: jax.Array) -> jax.Array:
        wide = accumulation_dtype(x.dtype)
        return (factor.astype(wide) * x.astype(wide)).astype(x.dtype)

    return jax.tree.map(leaf, tree)


def scale_and_cast(tree: PyTree, scale: jax.Array, grouping: Grouping, like: PyTree) -> PyTree:
    """Multiplies each leaf by its group's scale and casts it to the dtype of `like`.

    Args:
        tree: leaves [*shape], in the accumulation dtype.
        scale: [groups]; a group of scale 0 gives zeros.
        grouping: the group of every leaf.
        like: a tree whose leaves have the wanted dtypes.
    """
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(
        [
            jnp.where(scale[i] == 0, 0, x * scale[i].astype(x.dtype)).astype(target.dtype)
            for x, i, target in zip(leaves, grouping.ids, jax.tree.leaves(like), strict=True)
        ]
    )
