"""Gradients of dense layers, kept as the products that they are.

The gradient of a dense layer over a mini-batch is XᵀΔ, of its inputs X [c, m] and its errors
Δ [c, n]; c counts examples, or tokens. Where c is small it is much larger than the two, and it need
not be formed: what the rule asks of it can be had from X and Δ (`_inner_products` has how). Here
they are found: the last operation that makes such a gradient is left out.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jax.extend import core

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Factored:
    """The gradients X_iᵀΔ_i of k mini-batches; a leaf where a stack [k, *shape] would be one.

    Attributes:
        left: X [k, c, m].
        right: Δ [k, c, n].
        dtype: of the stack.
        precision: in which the network would have formed the products.
        product_shape: of a product, the axes that are m and those that are n.
        order: in which a gradient has these axes.
    """

    left: jax.Array
    right: jax.Array
    dtype: Any
    precision: Any
    product_shape: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def of(cls, left: jax.Array, right: jax.Array, recipe: "_Recipe") -> "Factored":
        """The operands of a recipe's product, as rows."""
        equation, axes, dtype = recipe
        contracted, batched = equation.params["dimension_numbers"]
        outer = []

        def as_rows(x: jax.Array, side: int) -> jax.Array:
            first = [*batched[side], *contracted[side]]
            rest = [i for i in range(x.ndim) if i not in first]
            outer.extend(x.shape[i] for i in rest)
            k = math.prod(x.shape[i] for i in batched[side])
            c = math.prod(x.shape[i] for i in contracted[side])
            return x.transpose(*first, *rest).reshape(k, c, -1)

        left, right = as_rows(left, 0), as_rows(right, 1)
        skip = len(batched[0])
        order = tuple(i - skip for i in axes[skip:])
        return cls(left, right, dtype, equation.params["precision"], tuple(outer), order)

    @property
    def count(self) -> int:
        """The number of mini-batches k."""
        return self.left.shape[0]

    def as_matrix(self, x: jax.Array) -> jax.Array:
        """[*shape], an array like one of the gradients, as [m, n]."""
        return x.transpose(np.argsort(self.order)).reshape(self.left.shape[-1], -1)

    def from_matrix(self, x: jax.Array) -> jax.Array:
        """[m, n] as [*shape]."""
        return x.reshape(self.product_shape).transpose(self.order)


def arrays(tree: PyTree) -> list[jax.Array]:
    """The leaves of a result of `evaluate`, of a `Factored` its factors."""
    leaves = jax.tree.leaves(tree)
    pairs = ((x.left, x.right) if isinstance(x, Factored) else (x,) for x in leaves)
    return [x for pair in pairs for x in pair]


def concatenate(parts: Sequence[Any]) -> jax.Array | Factored:
    """The leaves [k_i, ...] of several results of `evaluate` as one of [Σ k_i, ...]."""
    if not isinstance(parts[0], Factored):
        return jnp.concatenate(parts)
    left = jnp.concatenate([part.left for part in parts])
    right = jnp.concatenate([part.right for part in parts])
    return dataclasses.replace(parts[0], left=left, right=right)


class _Recipe(NamedTuple):
    """How a stack of gradients [k, *shape] is made, last."""

    equation: core.JaxprEqn  # the product X_iᵀΔ_i
    axes: tuple[int, ...]  # of the product, in the order of the stack's
    dtype: Any  # of the stack


def evaluate(function: Callable[..., PyTree], *args: PyTree, stacked: bool = True) -> PyTree:
    """`function(*args)`, with `Factored` leaves for products that are larger than their factors.

    Arrays remain where a product is not the last that happens: a kernel that is used twice has the
    sum of two, and what happens inside a loop or a jitted function is not looked into.

    Args:
        function: gives a tree of arrays.
        args: of it.
        stacked: whether these lead with k; those of one mini-batch are given a leading axis.
    """
    closed, shapes = _trace(function, *args)
    jaxpr = closed.jaxpr
    recipes = _recipes(jaxpr, stacked)
    outputs: list[Any] = []
    for output, recipe in zip(jaxpr.outvars, recipes, strict=True):
        outputs += [output] if recipe is None else recipe.equation.invars
    shorter = jaxpr.replace(
        outvars=outputs, debug_info=jaxpr.debug_info._replace(result_paths=None)
    )
    values = iter(eval_jaxpr(shorter, closed.consts, *jax.tree.leaves(args)))
    results = []
    for recipe in recipes:
        x = next(values)
        if recipe is not None:
            results.append(Factored.of(x, next(values), recipe))
        else:
            results.append(x if stacked else jnp.asarray(x)[None])
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def count_entries(function: Callable[..., PyTree], *args: PyTree) -> int:
    """How many entries `evaluate(function, *args)` has of one mini-batch, factors for products."""
    closed, _ = _trace(function, *args)
    outputs = zip(closed.jaxpr.outvars, _recipes(closed.jaxpr, stacked=False), strict=True)
    return sum(
        _size(output) if recipe is None else sum(map(_size, recipe.equation.invars))
        for output, recipe in outputs
    )


def _trace(function: Callable[..., PyTree], *args: PyTree) -> tuple[core.ClosedJaxpr, PyTree]:
    return jax.make_jaxpr(function, return_shape=True)(*args)


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def _recipes(jaxpr: core.Jaxpr, stacked: bool) -> list[_Recipe | None]:
    """How each output is made, or None where it is no product or is smaller than its factors."""
    makers = {output: equation for equation in jaxpr.eqns for output in equation.outvars}
    return [_recipe(output, makers, stacked) for output in jaxpr.outvars]


def _recipe(output: Any, makers: dict[Any, core.JaxprEqn], stacked: bool) -> _Recipe | None:
    axes = tuple(range(output.aval.ndim))
    variable = output
    while not isinstance(variable, core.Literal) and (maker := makers.get(variable)) is not None:
        name = maker.primitive.name
        if name == "dot_general":
            recipe = _Recipe(maker, axes, output.aval.dtype)
            return recipe if _is_smaller(recipe, stacked) else None
        if name == "transpose":
            axes = tuple(maker.params["permutation"][i] for i in axes)
        elif name != "convert_element_type":
            return None
        variable = maker.invars[0]
    return None


def _is_smaller(recipe: _Recipe, stacked: bool) -> bool:
    """Whether a product is one of matrices, k pairs where stacked, that are smaller than it is."""
    equation = recipe.equation
    _, (batched, _) = equation.params["dimension_numbers"]
    product: Any = equation.outvars[0]
    if len(batched) != stacked or (stacked and recipe.axes[0] != 0):
        return False
    if not jnp.issubdtype(product.aval.dtype, jnp.floating):
        return False
    return sum(map(_size, equation.invars)) <= _size(product)
