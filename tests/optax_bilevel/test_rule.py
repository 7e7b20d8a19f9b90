"""The rule against a float64 oracle, and the identities that follow from the equations.

What "relative" means. ⟨g_v, g_i⟩ may cancel to nothing, so its rounding error is relative to
|g_v||g_i|, not to itself; the oracle carries that (and, for eq. (8), the conditioning of the linear
system) through the equations as a bound for a relative error of 1. Errors are held to 1e-6 of this
bound in float32 and 1e-12 in float64. Without cancellation the bound is a small multiple of the
result itself.
"""

import functools
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import optax_bilevel
from tests.optax_bilevel import oracle
from tests.optax_bilevel.problems import assert_close, distance, stack_of

# Every structure is compiled once, which takes most of the time, and met with this many values.
DRAWS = 4
structured = hypothesis.settings(max_examples=hypothesis.settings().max_examples // DRAWS)


class Structure(NamedTuple):
    """What is static: the shapes of the leaves, k, the groups (and their indices), the options."""

    shapes: list[tuple[int, ...]]
    k: int
    groups: str | list[str] | None
    ids: list[int]
    options: dict


class Values(NamedTuple):
    """What is not: the gradients' seed, scale and spread (as powers of ten), λ̂ and μ̂."""

    seed: int
    scale: float
    spread: float
    lam: float
    mu: float


@st.composite
def structures(draw):
    shape = st.lists(st.integers(1, 5), max_size=3).map(tuple)
    shapes = draw(st.lists(shape, min_size=1, max_size=4))
    num_validation = draw(st.integers(1, 3))
    k = draw(st.integers(num_validation + 1, 32))
    groups = draw(
        st.sampled_from([None, "leaf"])
        | st.lists(st.sampled_from("abc"), min_size=len(shapes), max_size=len(shapes))
    )
    if isinstance(groups, list):
        ids = [list(dict.fromkeys(groups)).index(label) for label in groups]
    else:
        ids = [0] * len(shapes) if groups is None else list(range(len(shapes)))
    options = {
        "num_validation": num_validation,
        "solver": draw(st.sampled_from(["diagonal", "exact"])),
        "normalize": draw(st.booleans()),
        "nonnegative": draw(st.booleans()),
    }
    return Structure(shapes, k, groups, ids, options)


POWER = st.floats(-6, 6)
VALUES = st.lists(
    st.builds(
        Values,
        seed=st.integers(0, 2**31),
        scale=POWER,
        spread=st.sampled_from([0.0, 1.0]),
        lam=POWER.map(lambda x: 10.0**x),
        mu=POWER.map(lambda x: 10.0**x),
    ),
    min_size=DRAWS,
    max_size=DRAWS,
)


def draw_leaves(structure, values, dtype):
    """The stack; the mini-batches' scales differ by up to 10**±spread."""
    scale = values.scale / 2 if dtype == jnp.float16 else values.scale  # 1e6 is beyond float16
    spread = np.random.default_rng(values.seed).uniform(-1, 1, structure.k) * values.spread
    wide = jnp.complex64 if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.float32
    leaves = stack_of(values.seed, structure.shapes, structure.k, wide)
    factors = 10 ** (scale + spread)
    return [
        jnp.asarray(oracle.widen(x) * factors.reshape(-1, *(1,) * (x.ndim - 1)), dtype)
        for x in leaves
    ]


def compiled(structure):
    """(leaves, lam, mu) -> (weights [groups, k], update leaves), by the library."""

    @jax.jit
    def run(leaves, lam, mu):
        options = {"groups": structure.groups, **structure.options}
        weights = optax_bilevel.bilevel_weights(leaves, lam, mu, **options)
        tx: Any = optax_bilevel.bilevel_reweight(lam, mu, **options)
        update, _ = tx.update(leaves, tx.init(None))
        return jnp.reshape(weights, (-1, structure.k)), update

    return run


def check(structure, run, values, dtype, eps):
    leaves = draw_leaves(structure, values, dtype)
    weights, update = run(leaves, values.lam, values.mu)
    weights = oracle.widen(weights)
    ids, options = structure.ids, structure.options
    expected = oracle.reweight(leaves, ids, values.lam, values.mu, **options)
    info = jnp.finfo(dtype)

    assert np.isfinite(weights).all()
    assert not weights[:, : options["num_validation"]].any()
    if options["normalize"]:
        total = np.abs(weights).sum(axis=1)
        np.testing.assert_allclose(total[total > 0], 1, rtol=1e-6)
    if options["nonnegative"]:
        assert (weights >= 0).all()
    for u, leaf in zip(update, leaves, strict=True):
        assert u.dtype == leaf.dtype
        assert u.shape == leaf.shape[1:]

    compared = 0
    for group in range(len(weights)):
        # A bound of 10% says that rounding decides what comes out: nothing to compare.
        size = np.abs(expected.weights[group]).sum()
        if eps * expected.weights_bound[group] > 0.1 * size:
            continue
        compared += 1
        error = np.abs(weights[group] - expected.weights[group]).sum()
        assert error <= eps * expected.weights_bound[group]

        pairs = [
            (oracle.widen(u), e)
            for u, e, g in zip(update, expected.update, ids, strict=True)
            if g == group
        ]
        if max(np.abs(e).max() for _, e in pairs) > float(info.max) / 2:
            continue  # float16 without the normalisation
        error = np.sqrt(sum(np.sum(np.abs(u - e) ** 2) for u, e in pairs))
        size = np.sqrt(sum(np.sum(np.abs(e) ** 2) for _, e in pairs))
        # The cast to the leaves' dtype rounds once, and flushes what is too small for it.
        flushed = float(info.tiny) * np.sqrt(sum(e.size for _, e in pairs))
        assert error <= eps * expected.update_bound[group] + float(info.eps) / 2 * size + flushed
    return compared


@structured
@given(structure=structures(), draws=VALUES)
def test_matches_the_oracle_in_float32(structure, draws):
    run = compiled(structure)
    for values in draws:
        check(structure, run, values, jnp.float32, 1e-6)


@structured
@given(
    structure=structures(),
    draws=VALUES,
    dtype=st.sampled_from([jnp.bfloat16, jnp.float16, jnp.complex64]),
)
def test_matches_the_oracle_in_other_dtypes(structure, draws, dtype):
    """Half precision costs nothing but the rounding of its gradients, which the oracle gets too."""
    run = compiled(structure)
    for values in draws:
        check(structure, run, values, dtype, 1e-6)


@structured
@given(structure=structures(), draws=VALUES, dtype=st.sampled_from([jnp.float64, jnp.complex128]))
def test_matches_the_oracle_in_float64(structure, draws, dtype):
    with jax.enable_x64(True):
        run = compiled(structure)
        for values in draws:
            check(structure, run, values, dtype, 1e-12)


# XLA's matrix product rounds a Gram entry to 5e-7, and eq. (8) magnifies that by the condition of
# its matrix, here about 4.
@pytest.mark.parametrize(("solver", "eps"), [("diagonal", 1e-6), ("exact", 3e-6)])
def test_ordinary_cases_agree_to_a_millionth_of_the_result(solver, eps):
    """Without allowance for cancellation; and the bounds leave every one of them to compare."""
    options = {"num_validation": 2, "solver": solver, "normalize": True, "nonnegative": False}
    structure = Structure([(50, 40), (9,)], 8, None, [0, 0], options)
    run = compiled(structure)
    for seed in range(5):
        for scale in (-6.0, 0.0, 6.0):
            values = Values(seed, scale, 0.0, 1.0, 0.01)
            assert check(structure, run, values, jnp.float32, 1e-6) == 1
            leaves = draw_leaves(structure, values, jnp.float32)
            weights, update = run(leaves, values.lam, values.mu)
            expected = oracle.reweight(leaves, structure.ids, values.lam, values.mu, **options)
            assert np.abs(weights - expected.weights).sum() <= eps
            assert distance(update, expected.update) <= eps


@structured
@given(structure=structures(), draws=VALUES)
def test_bfloat16_weights_are_near_float32s(structure, draws):
    """Against float32 on the same gradients, rounded to 3 digits, and on the unrounded ones."""
    options = {**structure.options, "solver": "diagonal", "normalize": True}
    run = jax.jit(
        functools.partial(optax_bilevel.bilevel_weights, groups=structure.groups, **options)
    )
    for values in draws:
        leaves = draw_leaves(structure, values, jnp.float32)
        rounded = [x.astype(jnp.bfloat16) for x in leaves]
        widened = [x.astype(jnp.float32) for x in rounded]
        of_leaves, of_rounded, of_widened = (
            np.reshape(run(x, values.lam, values.mu), (-1, structure.k))
            for x in (leaves, rounded, widened)
        )
        np.testing.assert_allclose(of_rounded, of_widened, atol=1e-6)
        expected = oracle.reweight(leaves, structure.ids, values.lam, values.mu, **options)
        error = np.abs(of_rounded - of_leaves).max(axis=1)
        assert (error <= 1e-2 * np.maximum(expected.weights_bound, 1)).all()


def test_bfloat16_weights_of_a_network_are_within_a_hundredth():
    leaves = stack_of(0, [(64, 128), (128,), (128, 10), (10,)], 8)
    expected = optax_bilevel.bilevel_weights(leaves)
    half = optax_bilevel.bilevel_weights([x.astype(jnp.bfloat16) for x in leaves])
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, expected, atol=1e-2)
    assert np.abs(half - expected).max() > 0  # they are not the same gradients


# ----------------------------------------------------------------------------------- identities


def jitted_weights(leaves, lam=1.0, mu=0.01, **options):
    return jax.jit(functools.partial(optax_bilevel.bilevel_weights, **options))(leaves, lam, mu)


LEAVES = stack_of(3, [(4, 3), (5,), ()], 9)


@pytest.mark.parametrize("solver", ["diagonal", "exact"])
def test_normalised_only_the_product_of_lam_and_mu_matters(solver):
    def weights(lam, mu):
        return jitted_weights(LEAVES, lam, mu, solver=solver)

    np.testing.assert_allclose(weights(4.0, 0.5), weights(1.0, 2.0), atol=1e-6)
    np.testing.assert_allclose(weights(0.01, 200.0), weights(1.0, 2.0), atol=1e-6)
    assert np.abs(weights(4.0, 2.0) - weights(1.0, 2.0)).max() > 1e-3


@pytest.mark.parametrize("solver", ["diagonal", "exact"])
def test_two_mini_batches_give_the_sign_of_their_agreement(solver):
    for seed in range(5):
        leaves = stack_of(seed, [(4,)], 2)
        tx: Any = optax_bilevel.bilevel_reweight(solver=solver)
        (update,), _ = tx.update(leaves, tx.init(None))
        validation, train = leaves[0]
        np.testing.assert_allclose(update, np.sign(validation @ train) * train, rtol=1e-6)


def test_a_sum_loss_is_a_mean_loss_with_a_smaller_mu():
    examples, mu = 16, 30.0
    of_mean = jitted_weights(LEAVES, mu=mu / examples**2)
    of_sum = jitted_weights([x * examples for x in LEAVES], mu=mu)
    np.testing.assert_allclose(of_sum, of_mean, rtol=1e-6)
    assert np.abs(of_sum - jitted_weights(LEAVES, mu=mu)).max() > 1e-3


PERMUTED = {
    solver: jax.jit(
        functools.partial(optax_bilevel.bilevel_weights, num_validation=2, solver=solver)
    )
    for solver in ("diagonal", "exact")
}


@pytest.mark.parametrize("solver", PERMUTED)
@given(seed=st.integers(0, 1000), order=st.permutations(range(2, 9)))
def test_permuted_training_mini_batches_permute_the_weights(solver, seed, order):
    leaves = stack_of(seed, [(4, 3), (5,)], 9)
    index = np.array([0, 1, *order])
    permuted = PERMUTED[solver]([x[index] for x in leaves])
    np.testing.assert_allclose(permuted, PERMUTED[solver](leaves)[index], atol=1e-5)


def test_validation_mini_batches_may_be_swapped():
    index = np.array([1, 0, *range(2, 9)])
    permuted = jitted_weights([x[index] for x in LEAVES], num_validation=2)
    np.testing.assert_allclose(permuted, jitted_weights(LEAVES, num_validation=2), atol=1e-6)


def test_weights_by_hand():
    """λ̂ = 2, μ̂ = 1: ⟨g_v, g⟩ = 2, -4, 6; |g|²/2 + 1 = 3, 9, 19; ω = 2/3, -4/9, 6/19."""
    gradients = jnp.array([[2.0, 0.0], [1.0, 3.0**0.5], [-2.0, 12.0**0.5], [3.0, 27.0**0.5]])
    raw = np.array([0, 2 / 3, -4 / 9, 6 / 19])
    np.testing.assert_allclose(
        optax_bilevel.bilevel_weights(gradients, 2.0, 1.0, normalize=False), raw, rtol=1e-6
    )
    np.testing.assert_allclose(
        jitted_weights(gradients, lam=2.0, mu=1.0), raw / np.abs(raw).sum(), rtol=1e-6
    )
    positive = np.maximum(raw, 0)
    np.testing.assert_allclose(
        jitted_weights(gradients, lam=2.0, mu=1.0, nonnegative=True),
        positive / positive.sum(),
        rtol=1e-6,
    )


def test_exact_weights_by_hand():
    """Two training gradients (1,0), (1,1), g_v = (1,1), λ̂ = μ̂ = 1: [[2,1],[1,3]] ω = [1,2]."""
    gradients = jnp.array([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(
        jitted_weights(gradients, 1.0, 1.0, solver="exact", normalize=False),
        [0, 1 / 5, 3 / 5],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        jitted_weights(gradients, 1.0, 1.0, solver="exact"), [0, 1 / 4, 3 / 4], rtol=1e-6
    )


def test_exact_and_diagonal_agree_on_orthogonal_gradients():
    gradients = jnp.concatenate(
        [jnp.array([[1.0, 2.0, -3.0, 4.0]]), jnp.diag(jnp.arange(1.0, 5.0))]
    )
    np.testing.assert_allclose(
        jitted_weights(gradients, solver="exact"),
        jitted_weights(gradients),
        rtol=1e-6,
    )


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_exact_weights_of_repeated_gradients_are_equal(scale):
    """Eq. (8) is singular to rounding there; the solution of least norm treats equals alike."""
    rows = stack_of(0, [(6,)], 3, scale=scale)[0]
    gradients = rows[jnp.array([0, 1, 1, 1, 2, 2])]
    weights = jitted_weights(gradients, mu=1e-9 * scale**2, solver="exact")
    np.testing.assert_allclose(weights[1:4], weights[1], rtol=1e-3)
    np.testing.assert_allclose(weights[4:6], weights[4], rtol=1e-3)
    merged = jitted_weights(rows, mu=1e-9 * scale**2, solver="exact")
    np.testing.assert_allclose([weights[1:4].sum(), weights[4:6].sum()], merged[1:], rtol=1e-3)


def test_groups_are_rules_of_their_own():
    """Each group's weights are those of its leaves alone, in the order labels first appear."""
    kernel, bias, gain = LEAVES
    tree = {"a": kernel, "b": bias, "c": gain}
    labels = {"a": "second", "b": "first", "c": "second"}
    weights = jitted_weights(tree, groups=labels)
    np.testing.assert_allclose(weights[0], jitted_weights([kernel, gain]), rtol=1e-6)
    np.testing.assert_allclose(weights[1], jitted_weights(bias), rtol=1e-6)
    per_leaf = jitted_weights(tree, groups="leaf")
    for row, leaf in zip(per_leaf, LEAVES, strict=True):
        np.testing.assert_allclose(row, jitted_weights(leaf), rtol=1e-6)


def test_groups_may_be_a_prefix_or_a_callable():
    kernel, bias, gain = LEAVES
    tree = {"layer": {"kernel": kernel, "bias": bias}, "gain": gain}
    full = {"layer": {"kernel": "l", "bias": "l"}, "gain": "g"}
    expected = jitted_weights(tree, groups=full)
    assert expected.shape == (2, 9)
    for groups in ({"layer": "l", "gain": "g"}, lambda tree: {name: name for name in tree}):
        np.testing.assert_array_equal(jitted_weights(tree, groups=groups), expected)


def test_health_by_hand():
    """Cosines 1/2, -1/2, 1/2 of angles of 60° and 120°; weights as in test_weights_by_hand."""
    gradients = jnp.array([[2.0, 0.0], [1.0, 3.0**0.5], [-2.0, 12.0**0.5], [3.0, 27.0**0.5]])
    tx: Any = optax_bilevel.bilevel_reweight(2.0, 1.0, num_batches=4)
    _, state = tx.update(gradients, tx.init(None))
    raw = np.array([2 / 3, -4 / 9, 6 / 19])
    normalized = raw / np.abs(raw).sum()
    np.testing.assert_allclose(state.cosine, 1 / 6, rtol=1e-6)
    np.testing.assert_allclose(state.negative, 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(state.effective, 1 / np.sum(normalized**2), rtol=1e-6)
    np.testing.assert_allclose(state.weights, [0, *normalized], rtol=1e-6)
    assert state.dropped == 0
    assert state.count == 1


def test_the_update_is_the_weighted_sum_and_leaves_validation_out():
    tx: Any = optax_bilevel.bilevel_reweight(num_batches=9, num_validation=2)
    update, state = jax.jit(tx.update)(LEAVES, tx.init(None))
    assert (state.weights[:2] == 0).all()
    assert_close(update, [np.tensordot(state.weights, x, 1) for x in LEAVES])
