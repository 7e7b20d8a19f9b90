"""Gradients of dense and convolutional layers, kept as the products that they are.

The gradient of a dense layer over a mini-batch is XᵀΔ, of its inputs X [c, m] and its errors
Δ [c, n]; c counts examples, or tokens. Where c is small it is much larger than the two, and it need
not be formed: what the rule asks of it can be had from X and Δ (`_inner_products` has how). Here
they are found: the last operation that makes such a gradient is left out.

A convolution's is such a product, too: X has the windows that it sees, and c counts their places,
which are few in the last layers of a network.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

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
        kept: whether sums of such gradients are left to be products, of more rows.
    """

    left: jax.Array
    right: jax.Array
    dtype: Any
    precision: Any
    product_shape: tuple[int, ...]
    order: tuple[int, ...]
    kept: bool

    @classmethod
    def of(cls, left: jax.Array, right: jax.Array, recipe: "_Recipe", kept: bool) -> Self:
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
        precision = recipe.params["precision"]
        return cls(left, right, recipe.dtype, precision, tuple(outer), order, kept)

    @property
    def count(self) -> int:
        """The number of mini-batches k."""
        return self.left.shape[0]

    @property
    def last(self) -> tuple[jax.Array, jax.Array]:
        """The last entries of both along the axis that sums make longer."""
        return self.left[:, -1], self.right[:, -1]

    def rows(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """X [k, c, m] and Δ [k, c, n]."""
        return self.left.astype(dtype), self.right.astype(dtype)

    def as_matrix(self, x: jax.Array) -> jax.Array:
        """[*shape], an array like one of the gradients, as [m, n]."""
        return x.transpose(np.argsort(self.order)).reshape(-1, self.right.shape[-1])

    def summed(self, omega: jax.Array) -> Self:
        """Σ_i ω_i X_iᵀΔ_i as one product of the rows of all; ω [k], 0 leaves out."""

        def joined(x: jax.Array, weight: jax.Array) -> jax.Array:
            weight = weight.reshape(-1, *(1,) * (x.ndim - 1))
            x = jnp.where(weight == 0, 0, weight * x.astype(weight.dtype))
            return x.reshape(1, -1, *x.shape[2:])

        kept = (omega != 0).astype(omega.dtype)
        return dataclasses.replace(
            self, left=joined(self.left, omega), right=joined(self.right, kept)
        )

    def __add__(self, other: Self) -> Self:
        """The sum of two that stand for one gradient each: a product of the rows of both."""
        left, right = (
            jnp.concatenate(x, axis=1) for x in ((self.left, other.left), (self.right, other.right))
        )
        return dataclasses.replace(self, left=left, right=right)

    def formed(self, dtype: Any) -> jax.Array:
        """Σ_i X_iᵀΔ_i, [*shape]."""
        product = jnp.einsum("kcm,kcn->mn", *self.rows(dtype), precision=self.precision)
        return product.reshape(self.product_shape).transpose(self.order)


@dataclasses.dataclass(frozen=True, eq=False)
class FactoredConvolution(Factored):
    """The same of a convolution, whose X has the windows of an input: each of its values often.

    `product_shape` is (*window, input features, output features), and c is examples · places.

    Attributes:
        left: the input [k, examples, *space, input features].
        right: Δ [k, examples, *places, output features].
        options: padding, strides and dilations of the convolution of the two.
    """

    options: dict[str, Any]

    @classmethod
    def of(cls, left: jax.Array, right: jax.Array, recipe: "_Recipe", kept: bool) -> Self:
        """The operands of a recipe's convolution, with features last."""
        params, names = recipe.params, ("padding", "window_strides", "lhs_dilation", "rhs_dilation")
        lhs, rhs, out = params["dimension_numbers"]
        left = left.transpose(lhs[1], *lhs[2:], lhs[0])[None]
        right = right.transpose(rhs[1], *rhs[2:], rhs[0])[None]
        window = (recipe.shape[i] for i in out[2:])
        shape = (*window, left.shape[-1], right.shape[-1])
        # The axes of `shape` are those of the result in this order.
        axes = (*out[2:], out[0], out[1])
        order = tuple(axes.index(i) for i in recipe.axes)
        options = {name: params[name] for name in names}
        return cls(left, right, recipe.dtype, params["precision"], shape, order, kept, options)

    def rows(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """X [k, c, m] and Δ [k, c, n]."""
        options, x = self.options, self.left.astype(dtype)
        interior = [d - 1 for d in options["lhs_dilation"]]
        padding = [(*p, i) for p, i in zip(options["padding"], interior, strict=True)]
        x = jax.lax.pad(x, jnp.zeros((), dtype), [(0, 0, 0)] * 2 + padding + [(0, 0, 0)])
        steps = np.array(options["rhs_dilation"])
        extent = (np.array(self.right.shape[2:-1]) - 1) * steps + 1
        parts = []
        for place in np.ndindex(*self.product_shape[:-2]):
            start = np.array(options["window_strides"]) * place
            ends = (*x.shape[:2], *(start + extent), x.shape[-1])
            parts.append(jax.lax.slice(x, (0, 0, *start, 0), ends, (1, 1, *steps, 1)))
        k, m = self.count, math.prod(self.product_shape[:-1])
        right = self.right.astype(dtype)
        return jnp.stack(parts, -2).reshape(k, -1, m), right.reshape(k, -1, right.shape[-1])

    def formed(self, dtype: Any) -> jax.Array:
        """Σ_i X_iᵀΔ_i, [*shape]; windows are not written out."""
        left, right = (x.astype(dtype).reshape(-1, *x.shape[2:]) for x in (self.left, self.right))
        dims = left.ndim - 2
        inputs = (dims + 1, 0, *range(1, dims + 1))  # the examples are what is summed over
        places = [self.order.index(i) for i in range(dims + 2)]
        outputs = (places[dims], places[dims + 1], *places[:dims])
        return jax.lax.conv_general_dilated(
            left,
            right,
            **self.options,
            dimension_numbers=jax.lax.ConvDimensionNumbers(inputs, inputs, outputs),
            precision=self.precision,
        )


class _Recipe(NamedTuple):
    """How a stack of gradients [k, *shape] is made, last."""

    equation: core.JaxprEqn  # the product X_iᵀΔ_i
    axes: tuple[int, ...]  # of the product, in the order of the stack's
    dtype: Any  # of the stack

    @property
    def params(self) -> dict[str, Any]:
        return self.equation.params

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the product."""
        return _shape(self.equation.outvars[0])

    @property
    def kind(self) -> type[Factored]:
        return KINDS[self.equation.primitive.name]

    def count_entries(self) -> int:
        """Of the operands, those of all mini-batches."""
        return sum(map(_size, self.equation.invars))

    def count_row_entries(self) -> int:
        """Of X and Δ, those of all mini-batches."""
        if self.kind is Factored:
            return self.count_entries()
        lhs, rhs, out = self.params["dimension_numbers"]
        left, right = map(_shape, self.equation.invars)
        window = math.prod(self.shape[i] for i in out[2:])
        rows = math.prod(right[i] for i in rhs[1:])
        return rows * (left[lhs[0]] * window + right[rhs[0]])


KINDS = {"dot_general": Factored, "conv_general_dilated": FactoredConvolution}


def evaluate(
    function: Callable[..., PyTree],
    *args: PyTree,
    stacked: bool = True,
    keep: float | None = None,
) -> PyTree:
    """`function(*args)`, with `Factored` leaves for products that are larger than their factors.

    Arrays remain where a product is not the last that happens: a kernel that is used twice has the
    sum of two, and what happens inside a loop or a jitted function is not looked into.

    Args:
        function: gives a tree of arrays.
        args: of it.
        stacked: whether these lead with k; those of one mini-batch are given a leading axis.
        keep: leave sums to be products as well, and that only where the operands would be no
            larger than the product if there were so many times as many; None: form sums.
    """
    closed, shapes = _trace(function, *args)
    jaxpr = closed.jaxpr
    recipes = _recipes(jaxpr, stacked, keep or 1)
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
            results.append(recipe.kind.of(x, next(values), recipe, keep is not None))
        else:
            results.append(x if stacked else jnp.asarray(x)[None])
    return jax.tree.unflatten(jax.tree.structure(shapes), results)


def concatenate(parts: Sequence[Any]) -> jax.Array | Factored:
    """The leaves [k_i, ...] of several results of `evaluate` as one of [Σ k_i, ...]."""
    if not isinstance(parts[0], Factored):
        return jnp.concatenate(parts)
    left = jnp.concatenate([part.left for part in parts])
    right = jnp.concatenate([part.right for part in parts])
    return dataclasses.replace(parts[0], left=left, right=right)


def count_entries(function: Callable[..., PyTree], *args: PyTree) -> int:
    """How many entries `evaluate(function, *args)` has of one mini-batch, factors for products."""
    closed, _ = _trace(function, *args)
    outputs = zip(closed.jaxpr.outvars, _recipes(closed.jaxpr, False, 1), strict=True)
    return sum(
        _size(output) if recipe is None else recipe.count_entries() for output, recipe in outputs
    )


def _trace(function: Callable[..., PyTree], *args: PyTree) -> tuple[core.ClosedJaxpr, PyTree]:
    return jax.make_jaxpr(function, return_shape=True)(*args)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _size(variable: Any) -> int:
    return math.prod(_shape(variable))


def _recipes(jaxpr: core.Jaxpr, stacked: bool, times: float) -> list[_Recipe | None]:
    """How each output is made, or None where it is no product or is smaller than its factors."""
    makers = {output: equation for equation in jaxpr.eqns for output in equation.outvars}
    recipes = (_recipe(output, makers) for output in jaxpr.outvars)
    return [r if r is not None and _is_smaller(r, stacked, times) else None for r in recipes]


def _recipe(output: Any, makers: dict[Any, core.JaxprEqn]) -> _Recipe | None:
    axes = tuple(range(output.aval.ndim))
    variable = output
    while not isinstance(variable, core.Literal) and (maker := makers.get(variable)) is not None:
        name = maker.primitive.name
        if name in KINDS:
            return _Recipe(maker, axes, output.aval.dtype)
        if name == "transpose":
            axes = tuple(maker.params["permutation"][i] for i in axes)
        elif name != "convert_element_type":
            return None
        variable = maker.invars[0]
    return None


def _is_smaller(recipe: _Recipe, stacked: bool, times: float) -> bool:
    """Whether a product is one of matrices, k pairs where stacked, that are smaller than it is.

    And whether its operands still are if there are `times` as many of them.
    """
    if not jnp.issubdtype(recipe.dtype, jnp.floating):
        return False
    params = recipe.params
    if recipe.kind is Factored:
        _, (batched, _) = params["dimension_numbers"]
        if len(batched) != stacked or (stacked and recipe.axes[0] != 0):
            return False
    elif stacked or params["feature_group_count"] > 1 or params["batch_group_count"] > 1:
        return False
    size = math.prod(recipe.shape)
    return recipe.count_row_entries() <= size and times * recipe.count_entries() <= size
