"""The weighting rule: inner products of mini-batch gradients in, weights ω out.

Everything here takes and returns small arrays; no pytrees, no meshes, no devices. The paper is
Jenni & Favaro, *Deep Bilevel Learning*, ECCV 2018; equation numbers are the paper's.
"""

import dataclasses
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Scalar = Any  # a Python or NumPy number, or a traced scalar

SOLVERS = ("diagonal", "exact")
VALIDATIONS = ("batch", "past")
GUARDS = ("zero", "none")
PAST_DECAY = 0.9


def check_positive(name: str, value: Scalar, more: str = "") -> None:
    """Raises ValueError for a concrete number that is not positive and finite."""
    if isinstance(value, numbers.Real) and not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be a positive finite number, got {value}{more}")


def check_not_negative(name: str, value: Scalar) -> None:
    """Raises ValueError for a concrete number below 0, or NaN."""
    if isinstance(value, numbers.Real) and not float(value) >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def check_decay(name: str, value: Scalar) -> None:
    """Raises ValueError for a concrete number outside [0, 1)."""
    if isinstance(value, numbers.Real) and not 0 <= float(value) < 1:
        raise ValueError(
            f"{name} must be at least 0 and below 1, got {value}; 0.9 averages about the last ten "
            "steps"
        )


@dataclasses.dataclass(frozen=True)
class Rule:
    """The hyper-parameters of the rule, checked when it is made.

    Attributes:
        lam: λ̂ > 0, may be traced.
        mu: μ̂ > 0, may be traced.
        num_validation: number of leading mini-batches that form V; an int, or traced by
            `optax.inject_hyperparams`.
        solver: "diagonal" (eq. 10) or "exact" (eq. 8).
        normalize: divide ω by |ω|₁.
        nonnegative: clip ω at zero before normalising.
        validation: "batch" (V is a part of the step's mini-batches) or "past" (the average of the
            mean gradients of the steps before; `num_validation` then means nothing).
        decay: of that average, in [0, 1), may be traced; None with "batch", and for `PAST_DECAY`.
        guard: "zero" (no update where Σω < 0) or "none"; None with "batch", and for "zero".
    """

    lam: Scalar
    mu: Scalar
    num_validation: Any = 1
    solver: str = "diagonal"
    normalize: bool = True
    nonnegative: bool = False
    validation: str = "batch"
    decay: Scalar = None
    guard: str | None = None

    def __post_init__(self):
        """Raises ValueError where a concrete hyper-parameter is out of its range."""
        for name, value, default in (("lam", self.lam, 1.0), ("mu", self.mu, 0.01)):
            if callable(value):
                raise ValueError(
                    f"{name} is a schedule; wrap the factory: "
                    f"optax.inject_hyperparams(bilevel_reweight)({name}=schedule)"
                )
            check_positive(name, value, f"; the paper uses {name}={default}")
        if self.solver not in SOLVERS:
            raise ValueError(f"unknown solver {self.solver!r}; known: {', '.join(SOLVERS)}")
        if isinstance(self.num_validation, numbers.Real) and (
            not isinstance(self.num_validation, numbers.Integral) or int(self.num_validation) < 1
        ):
            raise ValueError(
                f"num_validation must be a positive integer, got {self.num_validation}"
            )
        if self.validation not in VALIDATIONS:
            known = ", ".join(VALIDATIONS)
            raise ValueError(f"unknown validation {self.validation!r}; known: {known}")
        if self.from_past:
            self._check_past()
        else:
            for name, value in (("decay", self.decay), ("guard", self.guard)):
                if value is not None:
                    raise ValueError(
                        f'{name} = {value} is for validation="past"; validation="batch" keeps no '
                        "average of earlier steps: leave it out"
                    )

    def _check_past(self) -> None:
        if isinstance(self.num_validation, numbers.Real) and self.num_validation != 1:
            raise ValueError(
                f'num_validation = {self.num_validation} is for validation="batch"; with "past" '
                "all k mini-batches train: leave it out"
            )
        if self.guard is not None and self.guard not in GUARDS:
            raise ValueError(f"unknown guard {self.guard!r}; known: {', '.join(GUARDS)}")
        if callable(self.decay):
            raise ValueError(
                "decay is a schedule; wrap the factory: optax.inject_hyperparams(bilevel_reweight)"
                '(validation="past", decay=schedule)'
            )
        check_decay("decay", self.decay)

    @property
    def from_past(self) -> bool:
        """Whether earlier steps validate, and all k mini-batches train."""
        return self.validation == "past"

    @property
    def past_decay(self) -> Scalar:
        """The decay of the average of the past."""
        return PAST_DECAY if self.decay is None else self.decay

    @property
    def held_out(self) -> Any:
        """How many leading mini-batches are not trained on; an int, or traced."""
        return 0 if self.from_past else self.num_validation

    def require_streamable(self, where: str, remedy: str) -> None:
        """Raises ValueError for eq. (8), which needs all gradients at once."""
        if self.solver == "exact":
            raise ValueError(
                f'{where} sees one mini-batch gradient at a time, and solver="exact" (eq. 8) needs '
                f"the inner products of all pairs: {remedy}"
            )


class Products(NamedTuple):
    """Inner products of k mini-batch gradients, per group of parameters.

    Attributes:
        dots: ⟨g_v, ∇ℓ_i⟩ with the validation gradient g_v, Σ_{j∈V} ∇ℓ_j or the average of the
            past, shape [groups, k].
        sq_norms: |∇ℓ_i|², shape [groups, k].
        validation_sq_norm: |g_v|², shape [groups].
        gram: ⟨∇ℓ_l, ∇ℓ_i⟩, shape [groups, k, k]; None unless the solver needs it.
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
        values: ω̂, shape [groups, k], zero in validation slots.
        scale: what the sum of `raw`-weighted gradients is multiplied by, shape [groups]:
            1/|ω|₁, or 1 without the normalisation, or 0 where there is nothing to weigh.
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


def diagonal_weights(
    dots: jax.Array, sq_norms: jax.Array, rule: Rule, has_past: jax.Array | None = None
) -> jax.Array:
    """ω_i = ⟨g_v, g_i⟩ / (|g_i|²/λ̂ + μ̂), eq. (10) before its normalisation.

    A mini-batch whose gradient is not finite in one group gets 0 in all of them.

    Args:
        dots: [groups, n].
        sq_norms: [groups, n].
        rule: gives λ̂, μ̂ and the sign constraint.
        has_past: whether there is a past to validate with, bool []; without one all ω are alike.
            None where the past does not validate.

    Returns:
        ω, [groups, n].
    """
    # inject_hyperparams casts them to the parameters' dtype, complex as that may be.
    lam, mu = (jnp.real(h).astype(sq_norms.dtype) for h in (rule.lam, rule.mu))
    denominator = sq_norms / lam + mu
    all_finite = finite(sq_norms)[None]
    usable = all_finite & jnp.isfinite(dots) & jnp.isfinite(denominator) & (denominator > 0)
    omega = jnp.where(usable, dots, 0) / jnp.where(usable, denominator, 1)
    omega = jnp.maximum(omega, 0) if rule.nonnegative else omega
    return omega if has_past is None else jnp.where(has_past, omega, all_finite.astype(omega.dtype))


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
    lam, mu = (jnp.real(h).astype(gram.dtype) for h in (rule.lam, rule.mu))
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


def weigh(products: Products, rule: Rule, has_past: jax.Array | None = None) -> Weights:
    """Turns the inner products of one step into its weights.

    A training mini-batch that is not finite gets weight 0; a validation gradient that is not
    finite, weights that are all zero, or the guard give a zero update (scale 0). Never NaN.

    Args:
        products: inner products of the k mini-batches, validation slots first.
        rule: the hyper-parameters.
        has_past: whether there is a past to validate with, bool []; without one the weights are
            uniform. None where the past does not validate.

    Returns:
        The normalised weights, the scale of the update and the health figures.
    """
    dots, sq_norms, validation_sq_norm, gram = products
    groups, k = sq_norms.shape
    is_validation = jnp.arange(k)[None] < rule.held_out
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
    if has_past is not None:
        raw = jnp.where(has_past, raw, active.astype(raw.dtype))

    l1 = jnp.sum(jnp.abs(raw), axis=-1)
    usable = l1 >= jnp.finfo(l1.dtype).tiny  # the inverse of anything smaller is infinite
    if rule.from_past and rule.guard != "none":
        usable = usable & (jnp.sum(raw, axis=-1) >= 0)
    scale = 1 / jnp.where(usable, l1, 1)
    if not rule.normalize:
        scale = jnp.ones_like(l1) if has_past is None else jnp.where(has_past, 1, scale)
    scale = jnp.where(usable, scale, 0)
    values = raw * scale[:, None]

    normalized = raw / jnp.where(usable, l1, 1)[:, None]
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
    return Weights(values, scale, health)


def past_rate(weight: jax.Array, num_finite: jax.Array, rule: Rule) -> tuple[jax.Array, jax.Array]:
    """How far the average of the past moves towards the mean gradient of a step.

    With the mean gradients m_s of the steps s = 1 ... t and the decay d, the average and the sum
    of its weights are a_t = Σ_s (1-d) d^{t-s} m_s / w_t and w_t = Σ_s (1-d) d^{t-s} = 1 - d^t: an
    exponential moving average without the bias of its start. One step of it is
    a_t = a_{t-1} + (1-d)/w_t · (m_t - a_{t-1}), whatever d was before.

    Args:
        weight: w of the steps so far, [], 0 before the first.
        num_finite: number of finite mini-batches of the step, int []; where it is 0 the step
            leaves the past alone.
        rule: gives d.

    Returns:
        The rate (1-d)/w_t, and w_t; [].
    """
    decay = jnp.real(rule.past_decay).astype(weight.dtype)
    new_weight = decay * weight + (1 - decay)
    moves = (num_finite > 0) & (new_weight > 0)
    rate = jnp.where(moves, (1 - decay) / jnp.where(moves, new_weight, 1), 0)
    return rate, jnp.where(moves, new_weight, weight)


def projections(dots: jax.Array, sq_norms: jax.Array) -> jax.Array:
    """c_i = ⟨p, g_i⟩/|g_i|, 0 where g_i is zero or not finite.

    Args:
        dots: ⟨p, g_i⟩, [groups, n].
        sq_norms: |g_i|², [groups, n].

    Returns:
        [groups, n].
    """
    usable = finite(sq_norms)[None] & (sq_norms > 0) & jnp.isfinite(dots)
    return jnp.where(usable, dots, 0) / jnp.sqrt(jnp.where(usable, sq_norms, 1))


def step_factor(
    average: jax.Array,
    variance: jax.Array,
    coherence: jax.Array,
    first: jax.Array,
    decay: Scalar,
    gain: Scalar,
    margin: Scalar,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How much of an optimizer's step is taken.

    Args:
        average: s̄ of the steps before, [].
        variance: v, of s about s̄, of the steps before, [].
        coherence: s of this step, [].
        first: whether there was no step before, bool [].
        decay: d_s, of both averages.
        gain: γ.
        margin: z.

    Returns:
        s̄ and v with this step in them, and the factor min(max(γ (s̄ - z σ), 0), 1), where
        σ² = v (1 - d_s)/(1 + d_s) is the variance of an average of independent s; [], of the dtype
        of `average`.
    """
    decay, gain, margin = (jnp.real(x).astype(average.dtype) for x in (decay, gain, margin))
    surprise = coherence.astype(average.dtype) - average
    smoothed = average + (1 - decay) * surprise
    # Never below zero: one factor is the other, times d_s.
    spread = decay * variance + (1 - decay) * surprise * (decay * surprise)
    smoothed = jnp.where(first, jnp.ones_like(smoothed), smoothed)
    spread = jnp.where(first, jnp.zeros_like(spread), spread)
    deviation = jnp.sqrt(spread * (1 - decay) / (1 + decay))
    return smoothed, spread, jnp.clip(gain * (smoothed - margin * deviation), 0, 1)


def average_loss(average: jax.Array, value: Any, decay: Scalar) -> jax.Array:
    """The average of losses with a loss more in it, [], of the dtype of `average`.

    Args:
        average: infinite before any.
        value: [], real; left out where it is not finite.
        decay: d.
    """
    value, decay = (jnp.real(x).astype(average.dtype) for x in (value, decay))
    blended = jnp.where(jnp.isfinite(average), decay * average + (1 - decay) * value, value)
    return jnp.where(jnp.isfinite(value), blended, average)
