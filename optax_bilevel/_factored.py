"""Gradients of dense layers, kept as the products that they are.

The gradient of a dense layer over a mini-batch is XᵀΔ, of its inputs X [c, m] and its errors
Δ [c, n]; c counts examples, or tokens. Where c is small it is much larger than the two, and it need
not be formed: all that the rule asks of it can be had from X and Δ. `evaluate` finds such gradients
and leaves out the last operation that makes them; `Factored` has their algebra.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Factored:
    """The gradients X_iᵀΔ_i of k mini-batches; a leaf where a stack [k, *shape] would be one.

    Products are taken in the highest precision, but for sums, in which the network's own is kept.

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
    def of(cls, left: jax.Array, right: jax.Array, recipe: "_Recipe") -> Self:
        """The operands of a recipe's product, as rows."""
        contracted, batched = recipe.params["dimension_numbers"]
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
        order = tuple(i - skip for i in recipe.axes[skip:])
        return cls(left, right, recipe.dtype, recipe.params["precision"], tuple(outer), order)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stack that this stands for, [k, *shape]."""
        return self.left.shape[0], *(self.product_shape[i] for i in self.order)

    def square_sums(self, dtype: Any) -> jax.Array:
        """|XᵀΔ|² = Σ (X Xᵀ) ∘ (Δ Δᵀ) of each, [k] (Goodfellow 2015, arXiv:1510.01799)."""
        left, right = (_contract("kcm,kdm->kcd", x, x) for x in self._rows(dtype))
        return jnp.maximum(jnp.sum(left * right, axis=(1, 2)), 0)

    def dots_with(self, v: jax.Array, dtype: Any) -> jax.Array:
        """⟨v, XᵀΔ⟩ = Σ (X v) ∘ Δ of each with v [*shape]: [k]."""
        left, right = self._rows(dtype)
        v = v.transpose(np.argsort(self.order)).reshape(-1, right.shape[-1])
        return jnp.sum(_contract("kcm,mn->kcn", left, v.astype(dtype)) * right, axis=(1, 2))

    def dots_with_first(self, count: int, dtype: Any) -> jax.Array:
        """⟨Σ_{j<count} X_jᵀΔ_j, XᵀΔ⟩ of each: [k]."""
        left, right = (_contract("jcm,kdm->kjcd", x[:count], x) for x in self._rows(dtype))
        return jnp.sum(left * right, axis=(1, 2, 3))

    def weighted_sum(self, omega: jax.Array) -> jax.Array:
        """Σ_i ω_i X_iᵀΔ_i [*shape], one product as on the whole batch; ω [k], 0 leaves out."""
        left, right = self._rows(omega.dtype)
        weight = omega[:, None, None]
        left = jnp.where(weight == 0, 0, weight * left)
        right = jnp.where(weight == 0, 0, right)
        product = jnp.einsum("kcm,kcn->mn", left, right, precision=self.precision)
        return product.reshape(self.product_shape).transpose(self.order)

    def _rows(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        return self.left.astype(dtype), self.right.astype(dtype)


def _contract(subscripts: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


def evaluate(function: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """`function(*args)`, with `Factored` leaves for products that are larger than their factors.

    Arrays remain where a product is not the last that happens: a kernel that is used twice has the
    sum of two, and what happens inside a loop or a jitted function is not looked into.

    Args:
        function: gives a tree of arrays that lead with k.
        args: of it.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    jaxpr = closed.jaxpr
    recipes = _recipes(jaxpr)
    outputs: list[Any] = []
    for output, recipe in zip(jaxpr.outvars, recipes, strict=True):
        outputs += [output] if recipe is None else recipe.equation.invars
    shorter = jaxpr.replace(
        outvars=outputs, debug_info=jaxpr.debug_info._replace(result_paths=None)
    )
    values = iter(eval_jaxpr(shorter, closed.consts, *jax.tree.leaves(args)))
    results = [
        next(values) if recipe is None else Factored.of(next(values), next(values), recipe)
        for recipe in recipes
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def count_entries(function: Callable[..., PyTree], *args: PyTree) -> int:
    """How many entries `evaluate(function, *args)` has, factors counted for products."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return sum(
        _size(output) if recipe is None else recipe.count_entries()
        for output, recipe in zip(jaxpr.outvars, _recipes(jaxpr), strict=True)
    )


class _Recipe(NamedTuple):
    """How a stack of gradients [k, *shape] is made, last."""

    equation: Any  # the product X_iᵀΔ_i
    axes: tuple[int, ...]  # of the product, in the order of the stack's
    dtype: Any  # of the stack

    @property
    def params(self) -> dict[str, Any]:
        return self.equation.params

    def count_entries(self) -> int:
        """Of X and Δ, those of all mini-batches."""
        return sum(map(_size, self.equation.invars))

    def is_smaller(self) -> bool:
        """Whether this is a product of k pairs of matrices that are smaller than it is."""
        batched = self.params["dimension_numbers"][1][0]
        if not jnp.issubdtype(self.dtype, jnp.floating) or len(batched) != 1 or self.axes[0] != 0:
            return False
        return self.count_entries() <= _size(self.equation.outvars[0])


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def _recipes(jaxpr: Any) -> list[_Recipe | None]:
    """How each output is made, or None where it is no product or is smaller than its factors."""
    makers = {output: equation for equation in jaxpr.eqns for output in equation.outvars}
    recipes = (_recipe(output, makers) for output in jaxpr.outvars)
    return [r if r is not None and r.is_smaller() else None for r in recipes]


def _recipe(output: Any, makers: dict[Any, Any]) -> _Recipe | None:
    axes = tuple(range(output.aval.ndim))
    variable = output
    # A literal, which nothing makes, has no hash.
    while not hasattr(variable, "val") and (maker := makers.get(variable)) is not None:
        name = maker.primitive.name
        if name == "dot_general":
            return _Recipe(maker, axes, output.aval.dtype)
        if name == "transpose":
            axes = tuple(maker.params["permutation"][i] for i in axes)
        elif name != "convert_element_type":
            return None
        variable = maker.invars[0]
    return None
