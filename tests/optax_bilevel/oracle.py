"""The rule in float64 NumPy, written from the paper's equations, and how far rounding may move it.

Everything takes a list of leaves [k, *shape] and the group index of each leaf.
"""

from typing import NamedTuple

import numpy as np


class Answer(NamedTuple):
    """What the rule gives, and bounds on the error of a computation with relative error 1.

    Multiply the bounds by a few units of rounding to get tolerances.

    Attributes:
        weights: ω̂, [groups, k].
        update: one array [*shape] per leaf.
        weights_bound: on Σ_i |error of ω̂_i|, [groups].
        update_bound: on |error of the group's part of the update|, [groups].
    """

    weights: np.ndarray
    update: list[np.ndarray]
    weights_bound: np.ndarray
    update_bound: np.ndarray


def widen(x):
    """An array of any dtype in float64 or complex128."""
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def reweight(
    leaves,
    groups,
    lam=1.0,
    mu=0.01,
    num_validation=1,
    solver="diagonal",
    normalize=True,
    nonnegative=False,
):
    """Eq. (10), or eq. (8), group by group."""
    leaves = [widen(x) for x in leaves]
    k, num_groups = leaves[0].shape[0], max(groups) + 1
    weights = np.zeros((num_groups, k))
    weights_bound, update_bound = np.zeros(num_groups), np.zeros(num_groups)
    for group in range(num_groups):
        members = [x for x, label in zip(leaves, groups, strict=True) if label == group]
        g = np.concatenate([x.reshape(k, -1) for x in members], axis=1)
        train = g[num_validation:]
        dots = np.zeros(len(train))
        reach = np.zeros(len(train))  # what rounding in `dots` is relative to: |g_j||g_i|
        norms = np.linalg.norm(g, axis=1)
        for j in range(num_validation):
            dots += np.real(train.conj() @ g[j])
            reach += norms[j] * norms[num_validation:]

        if solver == "diagonal":
            denominator = np.array([np.vdot(t, t).real / lam + mu for t in train])
            omega = dots / denominator
            error = reach / denominator
        else:
            omega, error = _solve(train, dots, reach, lam, mu)

        if nonnegative:
            omega = np.maximum(omega, 0)
        total = np.sum(np.abs(omega)) if normalize else 1.0
        if total > 0:
            omega, error = omega / total, error / total
        # Dividing by the sum of the |ω| brings in the sum of their errors.
        relative = np.sum(error) if normalize else 0.0
        error = error + np.abs(omega) * relative
        weights[group, num_validation:] = omega
        weights_bound[group] = np.sum(error)
        update_bound[group] = np.sum((error + np.abs(omega)) * norms[num_validation:])

    update = [np.tensordot(weights[group], x, 1) for x, group in zip(leaves, groups, strict=True)]
    return Answer(weights, update, weights_bound, update_bound)


def _solve(train, dots, reach, lam, mu):
    """ω of eq. (8) and a bound on its error, from the perturbation theory of linear systems.

    With the matrix A scaled to a unit diagonal by S, an entry of the Gram matrix is off by eps at
    most, so that y = S⁻¹ω is off by |A⁻¹| (|δA||y| + |δd|).
    """
    n = len(train)
    matrix = np.real(train.conj() @ train.T) / lam + mu * np.eye(n)
    scale = 1 / np.sqrt(np.diag(matrix))
    scaled = matrix * scale[:, None] * scale[None, :]
    solution = np.linalg.lstsq(scaled, scale * dots)[0]  # some cases are singular in float64 too
    inverse_norm = 1 / max(np.linalg.eigvalsh(scaled)[0], 1e-30)
    off = inverse_norm * (n * np.linalg.norm(solution) + np.linalg.norm(scale * reach))
    return scale * solution, scale * off
