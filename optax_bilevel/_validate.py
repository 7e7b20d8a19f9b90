"""What came, and what is said where it does not fit: every check, naming the leaf.

Values are checked where they are concrete numbers; traced ones pass.
"""

import numbers
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_bilevel import _mesh, _rule
from optax_bilevel._mesh import AxisName
from optax_bilevel._tree import Groups, PyTree, static_int

SOLVERS = ("diagonal", "exact")

TWO_LINES = """
    tx = optax_bilevel.coherent_steps(optimizer, total_steps=num_steps)
    updates, state = tx.update(grads, state, params, losses_fn=lambda p: losses(p, held_out))
where losses(params, batch) gives one loss per example, [n], and held_out is a batch that is not \
trained on, another one every step"""


# ------------------------------------------------------------------------------------ options


def positive(name: str, value: Any, more: str = "") -> None:
    """Raises ValueError for a concrete number that is not positive and finite."""
    if not isinstance(value, Tracer) and not np.all((np.real(value) > 0) & np.isfinite(value)):
        raise ValueError(f"{name} must be a positive finite number, got {value}{more}")


def at_least(name: str, value: Any, least: int) -> None:
    """Raises ValueError for a concrete number that is no integer or is too small."""
    is_integer = isinstance(value, numbers.Integral)
    if not isinstance(value, jax.Array) and not (is_integer and int(value) >= least):
        raise ValueError(f"{name} must be an integer of at least {least}, got {value}")


def rule(
    lam: Any,
    mu: Any,
    num_validation: Any,
    groups: Groups,
    solver: str,
    normalize: bool,
    nonnegative: bool,
) -> _rule.Rule:
    """The hyper-parameters, checked where they are concrete.

    Raises:
        ValueError: for one out of its range.
    """
    for name, value, default in (("lam", lam, 1.0), ("mu", mu, 0.01)):
        if callable(value):
            raise ValueError(
                f"{name} is a schedule; wrap the factory: "
                f"optax.inject_hyperparams(bilevel_reweight)({name}=schedule)"
            )
        positive(name, value, f"; the paper uses {name}={default}")
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
    at_least("num_validation", num_validation, 1)
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
    return _rule.Rule(lam, mu, num_validation, solver, normalize, nonnegative)


def enough(where: str, k: int, num_validation: Any) -> None:
    """Raises ValueError where k mini-batches leave none to train on."""
    held_out = static_int(num_validation)
    if held_out is not None and k <= held_out:
        raise ValueError(
            f"{where} with num_validation = {held_out} leave none to train on: k must be at least "
            f"{held_out + 1}"
        )


def num_batches(value: Any, groups: Groups, params: PyTree) -> int:
    """The k that `init` needs to make room for the weights.

    Raises:
        ValueError: where it is traced, or the number of groups cannot be known.
    """
    k = static_int(value)
    if k is None:
        raise ValueError(
            "num_batches is traced; under optax.inject_hyperparams inside jit pass "
            'static_args="num_batches"'
        )
    if groups is not None and params is None:
        raise ValueError(
            "init(None) cannot know how many groups there are: with groups and num_batches pass "
            "the parameters"
        )
    return k


# ------------------------------------------------------------------------------------- leaves


def path_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf in an error message."""
    return jax.tree_util.keystr(path) or "(the whole tree)"


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


_MASKS_AFTER = (
    " and would stay stacked. Put masks after the reweighting, which belongs first in the chain: "
    "optax.chain(bilevel_reweight(...), optax.masked(...)). Inside a partition whose other labels "
    "reduce their own leaves, pass allow_masked=True"
)
_MASKS_INSIDE = (
    ". Put masks inside, around the optimizer that is wrapped: coherent_steps(optax.masked(...)), "
    "bilevel_multi_steps(optax.partition(...), every_k)"
)


def no_masked(tree: PyTree, what: str = "gradient", remedy: str = _MASKS_AFTER) -> None:
    """Raises ValueError at the first `optax.MaskedNode`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_masked):
        if _is_masked(leaf):
            raise ValueError(
                f"{what} leaf {path_name(path)} is hidden by optax.masked or optax.partition"
                f"{remedy}"
            )


def inexact(tree: PyTree, what: str = "gradient", remedy: str = "") -> None:
    """Raises ValueError where a leaf is neither a real nor a complex floating-point array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"{what} leaf {path_name(path)}: expected a floating-point array, got "
                f"{dtype or type(leaf).__name__}{remedy}"
            )


def parameters(params: PyTree) -> None:
    """Checks what a transformation that keeps a buffer like the parameters is initialised with.

    Raises:
        ValueError: naming a leaf that is no floating-point array, and what to do with it.
    """
    no_masked(params, "parameter", _MASKS_INSIDE)
    inexact(
        params,
        "parameter",
        ". Give init the trained parameters alone: with Equinox eqx.filter(model, "
        "eqx.is_inexact_array), with Flax NNX nnx.state(model, nnx.Param)",
    )


# -------------------------------------------------------------------------------------- stacks


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
    if expected is None:
        return 0
    enough(f"k = {expected} mini-batches", expected, num_validation)
    return expected


def stack(
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
    if not allow_masked:
        no_masked(grads)
    inexact(grads)
    if params is not None:
        for path, leaf, shape in _beside(grads, params):
            if jnp.shape(leaf)[1:] != shape or jnp.ndim(leaf) != len(shape) + 1:
                expected = f"({', '.join(map(str, ('k', *shape)))})"
                raise ValueError(
                    f"gradient leaf {path_name(path)}: expected shape {expected} for a parameter "
                    f"of shape {shape}, got {jnp.shape(leaf)}. Stack the k mini-batch gradients "
                    "along a new leading axis, e.g. jax.vmap(jax.grad(loss), in_axes=(None, 0))"
                    "(params, batches). bilevel_reweight belongs first in the chain; what expects "
                    "gradients of the parameters' shape goes after it"
                )
    expected = None if num_batches is None else static_int(num_batches)
    return leading_axis(grads, num_validation, expected=expected)


def batches(params: PyTree, batches: PyTree, num_validation: Any) -> int:
    """How many mini-batches lead the leaves of `batches`.

    Raises:
        ValueError: naming the leaf; for a list of mini-batches that should have been stacked.
    """
    if isinstance(batches, (list, tuple)) and len(batches) > 1:
        structures = [jax.tree.structure(batch) for batch in batches]
        containers = all(isinstance(batch, (dict, list, tuple)) for batch in batches)
        if containers and structures.count(structures[0]) == len(batches):
            raise ValueError(
                f"batches is a {type(batches).__name__} of {len(batches)} mini-batches: stack them "
                "along a new leading axis, jax.tree.map(lambda *x: jnp.stack(x), *batches)"
            )
    k = leading_axis(batches, num_validation, what="batch")
    if not jax.tree.leaves(batches) or not jax.tree.leaves(params):
        raise ValueError("batches and params need at least one leaf each")
    return k


def one_gradient(grads: PyTree, like: PyTree, remedy: str) -> None:
    """Checks the gradient of one mini-batch against leaves shaped like the parameters.

    Raises:
        ValueError: naming the leaf, what was expected and what came.
    """
    no_masked(grads, remedy=_MASKS_INSIDE)
    inexact(grads)
    for path, leaf, shape in _beside(grads, like):
        if tuple(leaf.shape) != shape:
            raise ValueError(
                f"gradient leaf {path_name(path)}: expected the parameter's shape {shape}, got "
                f"{tuple(leaf.shape)}. {remedy}"
            )


def _beside(grads: PyTree, params: PyTree) -> Iterator[tuple[tuple[Any, ...], Any, tuple]]:
    """(path, gradient leaf, shape of the parameter) of every leaf that has both."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(
        grads, is_leaf=lambda x: x is None or _is_masked(x)
    )
    try:
        matching = treedef.flatten_up_to(params)
    except (ValueError, TypeError) as error:
        matching = jax.tree.leaves(params, is_leaf=lambda x: x is None)
        if len(matching) != len(leaves):  # else the same leaves in another container
            raise ValueError(f"gradients and params differ in structure: {error}") from error
    for (path, leaf), param in zip(leaves, matching, strict=True):
        if leaf is not None and hasattr(param, "shape"):
            yield path, leaf, tuple(param.shape)


# ------------------------------------------------------------------------- directions and losses


def direction(direction: PyTree, params: PyTree) -> PyTree:
    """A direction in the containers of `params`, compared leaf by leaf.

    Raises:
        ValueError: at the first leaf that does not go with its parameter.
    """
    inexact(params, "parameter")
    inexact(direction, "direction")
    if not jax.tree.leaves(params):
        raise ValueError("params needs at least one leaf")
    wanted = jax.tree_util.tree_leaves_with_path(params)
    given = jax.tree_util.tree_leaves_with_path(direction)
    # `nnx.Optimizer` keeps its state in other containers than the parameters'.
    for i in range(max(len(wanted), len(given))):
        if i >= len(given):
            path, p = wanted[i]
            raise ValueError(
                f"direction leaf {path_name(path)} is missing: params has it, of shape {p.shape}"
            )
        path, v = given[i]
        if i >= len(wanted):
            raise ValueError(f"direction leaf {path_name(path)} has no parameter to go with")
        p = wanted[i][1]
        name = f"direction leaf {path_name(path)}"
        if v.shape != p.shape:
            raise ValueError(
                f"{name}: expected the parameter's shape {p.shape}, got {v.shape}. The direction "
                "is one gradient; for several, jax.vmap over it"
            )
        if jnp.iscomplexobj(v) and not jnp.iscomplexobj(p):
            raise ValueError(f"{name}: expected real numbers for a real parameter, got {v.dtype}")
    return jax.tree.unflatten(jax.tree.structure(params), [v for _, v in given])


def losses(
    losses: Any,
    name: str = "the losses",
    wanted: str = "the losses of the examples, [n], before their mean",
) -> None:
    """Raises ValueError unless these are real numbers of examples, of at least one axis."""
    if not jax.tree_util.all_leaves([losses]):
        raise ValueError(f"{name} are no array but a {type(losses).__name__}: expected {wanted}")
    shape, dtype = jnp.shape(losses), jnp.result_type(losses)
    if not shape:
        raise ValueError(f"{name} are one scalar: expected {wanted}")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} have dtype {dtype}: expected real floating point, {wanted}")


def held_out(losses_fn: Any, alignment: Any, params: PyTree) -> None:
    """Checks what `coherent_steps` is told of held-out examples.

    Raises:
        ValueError: without any, with both kinds, without parameters, for what is no array [n].
    """
    if losses_fn is None and alignment is None:
        raise ValueError(f"coherent_steps needs held-out examples at every update: {TWO_LINES}")
    if losses_fn is not None and alignment is not None:
        raise ValueError("coherent_steps takes losses_fn or alignment, not both")
    if losses_fn is None:
        losses(alignment, "alignment", "of held-out examples, [n], by example_alignment")
    elif not callable(losses_fn):
        raise ValueError(
            f"losses_fn must be a function of the parameters, got {type(losses_fn).__name__}: "
            f"{TWO_LINES}"
        )
    elif params is None:
        raise ValueError("coherent_steps needs the parameters: tx.update(grads, state, params, …)")


# -------------------------------------------------------------------------------------- devices


def varying(grads: PyTree, axis_name: AxisName) -> None:
    """Raises ValueError where shard_map's autodiff has already summed a gradient over devices."""
    for axis in _mesh.axes_of(axis_name):
        if not _mesh.is_tracked(axis):
            continue  # then nothing is summed either
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
            if axis not in _mesh.varying_axes(leaf):
                raise ValueError(
                    f"gradient leaf {path_name(path)} is the same on all devices "
                    f"of axis {axis!r}: inside jax.shard_map, gradients with respect to replicated "
                    "parameters are summed over the devices. Differentiate with respect to "
                    f'jax.lax.pcast(params, {axis!r}, to="varying") instead'
                )
