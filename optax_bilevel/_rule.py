"""The paper's rule: inner products of mini-batch gradients in, weights ω out.

Small arrays in, small arrays out; no pytrees, no meshes, no checks. The paper is Jenni & Favaro,
*Deep Bilevel Learning*, ECCV 2018; equation numbers are the paper's.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Rule(NamedTuple):
    """The hyper-parameters of the rule; `_validate.rule` checks them.

    Attributes:
        lam: λ̂ > 0, may be traced.
        mu: μ̂ > 0, may be traced.
        num_validation: number of leading mini-batches that form V; an int, or traced by
            `optax.inject_hyperparams`.
        solver: "diagonal" (eq. 10) or "exact" (eq. 8).
        normalize: divide ω by |ω|₁.
        nonnegative: clip ω at zero before normalising.
    """

    lam: Any
    mu: Any
    num_validation: Any
    solver: str
    normalize: bool
    nonnegative: bool


class Products(NamedTuple):
    """Inner products of k mini-batch gradients, per group of parameters.

    Attributes:
        dots: ⟨g_v, ∇ℓ_i⟩ with the validation gradient g_v = Σ_{j∈V} ∇ℓ_j, [groups, k].
        sq_norms: |∇ℓ_i|², [groups, k].
        validation_sq_norm: |g_v|², [groups].
        gram: ⟨∇ℓ_l, ∇ℓ_i⟩, [groups, k, k]; None unless the solver needs it.
    """

    dots: jax.Array
    sq_norms: jax.Array
    validation_sq_norm: jax.Array
    gram: jax.Array | None = None


class Health(NamedTuple):
    """What a step's weights say about it; scalars, float32 but for `dropped` (int32).

    Attributes:
        cosine: mean cosine between the training mini-batches and the validation gradient.
        negative: share of the training mini-batches with a negative weight, in [0, 1].
        effective: effective number of mini-batches (Σ|ω|)²/Σω², 0 where there is no update.
        dropped: number of mini-batches of the k with a NaN or an Inf in their gradient.
    """

    cosine: jax.Array
    negative: jax.Array
    effective: jax.Array
    dropped: jax.Array


class Weights(NamedTuple):
    """The weights of one step.

    Attributes:
        values: ω̂, [groups, k], zero in validation slots.
        scale: what the sum of the gradients, each times its unnormalised ω, is multiplied by,
            [groups]: 1/|ω|₁, or 1 without the normalisation, or 0 where there is nothing to weigh.
        health: the figures of the step, averaged over groups.
    """

    values: jax.Array
    scale: jax.Array
    health: Health


def finite(sq_norms: jax.Array) -> jax.Array:
    """Which mini-batches have no NaN and no Inf in any group: [groups, n] -> [n].

    A finite |g|² is a finite g, and Cauchy-Schwarz then bounds every product.
    """
    return jnp.all(jnp.isfinite(sq_norms), axis=0)


def diagonal_weights(dots: jax.Array, sq_norms: jax.Array, rule: Rule) -> jax.Array:
    """ω_i = ⟨g_v, g_i⟩ / (|g_i|²/λ̂ + μ̂), eq. (10) before its normalisation.

    A mini-batch whose gradient is not finite in one group gets 0 in all of them.

    Args:
        dots: [groups, n].
        sq_norms: [groups, n].
        rule: gives λ̂, μ̂ and the sign constraint.

    Returns:
        ω, [groups, n].
    """
    lam, mu = _lam_and_mu(rule, sq_norms.dtype)
    denominator = sq_norms / lam + mu
    usable = finite(sq_norms)[None] & jnp.isfinite(dots)
    usable &= jnp.isfinite(denominator) & (denominator > 0)
    omega = jnp.where(usable, dots, 0) / jnp.where(usable, denominator, 1)
    return jnp.maximum(omega, 0) if rule.nonnegative else omega


def exact_weights(gram: jax.Array, dots: jax.Array, rule: Rule) -> jax.Array:
    """Solves (G_TT/λ̂ + μ̂I) ω = G_TV 1, eq. (8), in every group.

    Rows and columns of zeros (validation slots, dropped mini-batches) come out as 0.

    The matrix is scaled to a unit diagonal and solved through its eigenvalues; directions below
    the rounding error of the Gram matrix are left out, so that gradients which repeat each other
    give the solution of least norm instead of noise.

    Args:
        gram: [groups, k, k], symmetric positive semi-definite.
        dots: [groups, k].
        rule: gives λ̂, μ̂ and the sign constraint.

    Returns:
        ω, [groups, k].
    """
    lam, mu = _lam_and_mu(rule, gram.dtype)
    k = gram.shape[-1]
    identity = jnp.eye(k, dtype=gram.dtype)[None]
    matrix = gram / lam + mu * identity
    diagonal = jnp.sum(matrix * identity, axis=-1)
    scale = jax.lax.rsqrt(jnp.where(diagonal > 0, diagonal, 1))
    matrix = matrix * scale[..., :, None] * scale[..., None, :]
    eigenvalues, eigenvectors = jnp.linalg.eigh(matrix)
    tolerance = 4 * k * jnp.finfo(gram.dtype).eps * jnp.max(eigenvalues, axis=-1, keepdims=True)
    inverse = jnp.where(
        eigenvalues > tolerance, 1 / jnp.where(eigenvalues > tolerance, eigenvalues, 1), 0
    )

    def solve(right: jax.Array) -> jax.Array:
        in_basis = jnp.sum(eigenvectors * right[..., :, None], axis=-2)
        return jnp.sum(eigenvectors * (inverse * in_basis)[..., None, :], axis=-1)

    solution = solve(scale * dots)
    # One step of refinement: the eigenvectors are good to some ten units of rounding only.
    residual = scale * dots - jnp.sum(matrix * solution[..., None, :], axis=-1)
    omega = scale * (solution + solve(residual))
    return jnp.maximum(omega, 0) if rule.nonnegative else omega


def weigh(products: Products, rule: Rule) -> Weights:
    """Turns the inner products of one step into its weights.

    A training mini-batch that is not finite gets weight 0; a validation gradient that is not
    finite, or weights that are all zero, give a zero update (scale 0). Never NaN.

    Args:
        products: inner products of the k mini-batches, validation slots first.
        rule: the hyper-parameters.

    Returns:
        The normalised weights, the scale of the update and the health figures.
    """
    dots, sq_norms, validation_sq_norm, gram = products
    groups, k = sq_norms.shape
    is_validation = jnp.arange(k)[None] < rule.num_validation
    all_finite = finite(sq_norms)[None]  # [1, k]
    validation_finite = jnp.all(all_finite | ~is_validation) & jnp.all(
        jnp.isfinite(validation_sq_norm)
    )
    active = all_finite & ~is_validation & validation_finite
    dots = jnp.where(active, dots, 0)
    sq_norms = jnp.where(active, sq_norms, 0)

    if rule.solver == "exact":
        assert gram is not None
        gram = jnp.where(active[:, :, None] & active[:, None, :], gram, 0)
        # The solution is zero to rounding in the other slots; a NaN gradient takes an exact zero.
        raw = jnp.where(active, exact_weights(gram, dots, rule), 0)
    else:
        raw = diagonal_weights(dots, sq_norms, rule)

    l1 = jnp.sum(jnp.abs(raw), axis=-1)
    usable = l1 >= jnp.finfo(l1.dtype).tiny  # the inverse of anything smaller is infinite
    to_length_one = 1 / jnp.where(usable, l1, 1)
    scale = jnp.where(usable, to_length_one if rule.normalize else jnp.ones_like(l1), 0)

    normalized = raw * to_length_one[:, None]
    sum_sq = jnp.sum(jnp.square(normalized), axis=-1)
    norms = jnp.sqrt(sq_norms) * jnp.sqrt(validation_sq_norm)[:, None]
    cosines = jnp.where(norms > 0, dots / jnp.where(norms > 0, norms, 1), 0)
    num_active = jnp.maximum(jnp.sum(active), 1).astype(sq_norms.dtype) * groups
    health = Health(
        cosine=(jnp.sum(jnp.where(active, cosines, 0)) / num_active).astype(jnp.float32),
        negative=(jnp.sum((raw < 0).astype(sq_norms.dtype)) / num_active).astype(jnp.float32),
        effective=jnp.mean(
            jnp.where(usable, 1 / jnp.where(sum_sq > 0, sum_sq, 1), 0).astype(jnp.float32)
        ),
        dropped=jnp.sum(~all_finite, dtype=jnp.int32),
    )
    return Weights(raw * scale[:, None], scale, health)


def _lam_and_mu(rule: Rule, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """λ̂ and μ̂; inject_hyperparams casts them to the parameters' dtype, complex as that may be."""
    return jnp.real(rule.lam).astype(dtype), jnp.real(rule.mu).astype(dtype)
