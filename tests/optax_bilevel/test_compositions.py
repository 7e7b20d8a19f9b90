"""Together with the rest of optax and with Flax: the right result, or an error that says where."""

import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

from optax_bilevel import bilevel_multi_steps, bilevel_reweight, bilevel_value_and_grad
from tests.optax_bilevel import oracle
from tests.optax_bilevel.problems import (
    assert_close,
    batches_of,
    distance,
    loss,
    params_of,
    stack_of,
    stacked_gradients,
)

K = 4


@pytest.fixture(autouse=True)
def strict_promotion():
    """Not here: optax's schedules and adam, MultiSteps and Flax are not strict themselves."""


def params():
    return {"w": np.ones((3, 2), np.float32), "b": np.full(5, 2, np.float32)}


def stack(seed=0, k=K):
    w, b = stack_of(seed, [(3, 2), (5,)], k)
    return {"w": w, "b": b}


def reweighted(grads, **options):
    """The update, from the oracle."""
    b, w = oracle.reweight([grads["b"], grads["w"]], [0, 0], **options).update
    return {"w": np.float32(w), "b": np.float32(b)}


def check_shapes(updates, like):
    """The stacks are gone: `apply_updates` gives parameters of the old shapes."""
    applied = optax.apply_updates(like, updates)
    assert jax.tree.map(jnp.shape, applied) == jax.tree.map(jnp.shape, like)


# ------------------------------------------------------------------------------ chains of optax


def test_momentum_by_hand():
    """chain(reweight, sgd(0.1, momentum=0.9)) over three steps, m = 0.9 m + g, w = w - 0.1 m."""
    tx = optax.chain(bilevel_reweight(), optax.sgd(0.1, momentum=0.9))
    mine, state = params(), tx.init(params())
    expected = {name: np.asarray(x, np.float64) for name, x in params().items()}
    momentum = {name: np.zeros(x.shape) for name, x in params().items()}
    update = jax.jit(tx.update)
    for step in range(3):
        updates, state = update(stack(step), state, mine)
        mine = optax.apply_updates(mine, updates)
        for name, g in reweighted(stack(step)).items():
            momentum[name] = 0.9 * momentum[name] + g
            expected[name] = expected[name] - 0.1 * momentum[name]
    assert distance(mine, expected) <= 1e-6


def test_learning_rate_schedule():
    schedule = optax.piecewise_constant_schedule(1.0, {1: 0.1})
    tx = optax.chain(bilevel_reweight(), optax.sgd(schedule))
    state = tx.init(params())
    for rate in (1.0, 0.1, 0.1):
        updates, state = tx.update(stack(), state, params())
        assert_close(
            updates, jax.tree.map(lambda x, r=rate: np.float32(-r) * x, reweighted(stack()))
        )


def test_weight_decay_and_clipping_after_it():
    tx = optax.chain(
        bilevel_reweight(), optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.5)
    )
    updates, _ = jax.jit(tx.update)(stack(), tx.init(params()), params())
    expected = reweighted(stack())
    norm = np.sqrt(sum(np.sum(x**2) for x in expected.values()))
    assert norm > 0.1
    decayed = {name: x * 0.1 / norm + 0.5 * params()[name] for name, x in expected.items()}
    assert distance(updates, decayed) <= 1e-6


def test_masks_after_it():
    """Weight decay on matrices only, and one leaf frozen."""
    decay = optax.masked(optax.add_decayed_weights(0.5), {"w": True, "b": False})
    frozen = optax.masked(optax.set_to_zero(), {"w": False, "b": True})
    tx = optax.chain(bilevel_reweight(), decay, frozen)
    updates, _ = jax.jit(tx.update)(stack(), tx.init(params()), params())
    expected = reweighted(stack())["w"] + 0.5 * params()["w"]
    assert_close(updates, {"w": expected, "b": np.zeros(5, np.float32)})


def test_state_fields_are_found():
    tx = optax.chain(bilevel_reweight(num_batches=K), optax.adam(0.1))
    state = tx.init(params())
    for _ in range(2):
        _, state = tx.update(stack(), state, params())
    weights = oracle.reweight([stack()["b"], stack()["w"]], [0, 0]).weights[0]
    np.testing.assert_allclose(optax.tree.get(state, "weights"), weights, atol=1e-6)
    ratio = np.sum(np.abs(weights)) ** 2 / np.sum(weights**2)
    np.testing.assert_allclose(optax.tree.get(state, "effective"), ratio, rtol=1e-5)
    assert optax.tree.get(state, "negative") == pytest.approx(np.sum(weights < 0) / 3)
    assert optax.tree.get(state, "dropped") == 0
    assert -1 <= optax.tree.get(state, "cosine") <= 1
    counts = [count for _, count in optax.tree.get_all_with_path(state, "count")]
    assert [int(c) for c in counts] == [2, 2]


# ------------------------------------------------------------------------- inject_hyperparams


@pytest.mark.parametrize("jit", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_validation": 2},
        {"num_validation": 2, "num_batches": K},
        {"solver": "exact", "num_validation": 2},
        {"nonnegative": True},
        {"normalize": False},
    ],
)
def test_inject_hyperparams(options, jit):
    """λ̂ and μ̂ scheduled and nothing declared static, though numbers are traced then."""
    lam, mu = optax.linear_schedule(1.0, 3.0, 4), optax.linear_schedule(0.1, 1.1, 10)
    tx: Any = optax.inject_hyperparams(bilevel_reweight)(lam=lam, mu=mu, **options)
    state = tx.init(params())
    update = jax.jit(tx.update) if jit else tx.update
    options = {name: x for name, x in options.items() if name != "num_batches"}
    for step in range(3):
        updates, state = update(stack(step), state, params())
        expected = reweighted(stack(step), lam=1 + step / 2, mu=0.1 + step / 10, **options)
        assert_close(updates, expected, 2e-6 if "solver" in options else 1e-6)
        np.testing.assert_allclose(state.hyperparams["mu"], 0.1 + step / 10, rtol=1e-6)


def test_inject_hyperparams_without_the_normalisation_follows_lam_and_mu_alone():
    """With it only their product matters: the test above could not tell them apart."""
    schedule = optax.linear_schedule(1.0, 3.0, 2)
    for name in ("lam", "mu"):
        options = {"lam": 1.0, "mu": 1.0}
        factory = optax.inject_hyperparams(bilevel_reweight)
        tx = factory(**{**options, name: schedule}, normalize=False)
        state = tx.init(params())
        for value in (1.0, 2.0, 3.0):
            updates, state = tx.update(stack(), state, params())
            expected = reweighted(stack(), **{**options, name: value}, normalize=False)
            assert_close(updates, expected)


def test_inject_hyperparams_with_groups():
    factory = optax.inject_hyperparams(bilevel_reweight)
    tx = factory(mu=optax.constant_schedule(0.01), groups={"w": "a", "b": "b"}, num_batches=K)
    _, state = jax.jit(tx.update)(stack(), tx.init(params()), params())
    expected = oracle.reweight([stack()["b"], stack()["w"]], [0, 1]).weights
    np.testing.assert_allclose(optax.tree.get(state, "weights"), expected, atol=1e-6)

    def labels(tree):
        return jax.tree.map(lambda x: str(x.ndim), tree)

    static = optax.inject_hyperparams(bilevel_reweight, static_args="groups")
    tx = static(mu=optax.constant_schedule(0.01), groups=labels, num_batches=K)
    _, state = jax.jit(tx.update)(stack(), tx.init(params()), params())
    np.testing.assert_allclose(optax.tree.get(state, "weights"), expected, atol=1e-6)


def test_inject_hyperparams_takes_a_callable_for_a_schedule():
    tx = optax.inject_hyperparams(bilevel_reweight)(groups=lambda tree: jax.numpy.zeros(()))
    with pytest.raises(ValueError, match='needs static_args="groups"'):
        tx.init(params())


def test_inject_hyperparams_where_k_must_be_static():
    factory = functools.partial(optax.inject_hyperparams, bilevel_reweight)
    with pytest.raises(ValueError, match='static_args="num_batches"'):
        jax.jit(factory()(num_batches=K).init)(params())
    tx = factory(static_args="num_batches")(num_batches=K)
    _, state = jax.jit(tx.update)(stack(), jax.jit(tx.init)(params()), params())
    assert optax.tree.get(state, "weights").shape == (K,)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64])
def test_inject_hyperparams_casts_to_the_parameters_dtype(dtype):
    tx: Any = optax.inject_hyperparams(bilevel_reweight)(mu=optax.constant_schedule(0.5))
    zeros = jnp.zeros(5, dtype)
    grads = stack_of(0, [(5,)], K, dtype)[0]
    update, _ = tx.update(grads, tx.init(zeros), zeros)
    expected = oracle.reweight([grads], [0], mu=0.5).update[0]
    assert update.dtype == dtype
    np.testing.assert_allclose(oracle.widen(update), expected, rtol=1e-2)


# ------------------------------------------------- wrappers: the wrong way round, the right way


WRONG = "belongs first in the chain|which belongs first in the chain"


def test_masked():
    wrong = optax.masked(bilevel_reweight(), {"w": True, "b": False})
    with pytest.raises(ValueError, match=WRONG):
        wrong.init(params())
    state = optax.masked(bilevel_reweight(), {"w": True, "b": True}).init(params())
    with pytest.raises(ValueError, match=WRONG):
        wrong.update(stack(), state, params())


def test_masked_with_a_callable():
    wrong = optax.masked(bilevel_reweight(), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree))
    with pytest.raises(ValueError, match=WRONG):
        wrong.init(params())


LABELS = {"w": "train", "b": "frozen"}
Transforms = dict[Hashable, optax.GradientTransformation]


def test_partition_with_frozen_labels():
    transforms: Transforms = {"train": bilevel_reweight(), "frozen": optax.set_to_zero()}
    with pytest.raises(ValueError, match="pass allow_masked=True"):
        optax.partition(transforms, LABELS).init(params())


def test_partition_after_it():
    tx = optax.chain(
        bilevel_reweight(),
        optax.partition({"train": optax.sgd(1.0), "frozen": optax.set_to_zero()}, LABELS),
    )
    updates, _ = jax.jit(tx.update)(stack(), tx.init(params()), params())
    assert_close(updates, {"w": -reweighted(stack())["w"], "b": np.zeros(5, np.float32)})


def test_partition_whose_other_labels_reduce_their_own_leaves():
    mean = optax.stateless(lambda updates, _: jax.tree.map(lambda g: jnp.mean(g, 0), updates))
    transforms: Transforms = {
        "train": optax.chain(bilevel_reweight(allow_masked=True), optax.sgd(1.0)),
        "frozen": mean,
    }
    tx = optax.partition(transforms, LABELS)
    updates, _ = jax.jit(tx.update)(stack(), tx.init(params()), params())
    w = oracle.reweight([stack()["w"]], [0]).update[0]
    assert_close(updates, {"w": np.float32(-w), "b": stack()["b"].mean(axis=0)})
    check_shapes(updates, params())


def test_partition_with_a_rule_for_every_label():
    transforms: Transforms = {
        "train": bilevel_reweight(allow_masked=True, mu=1.0),
        "frozen": bilevel_reweight(allow_masked=True, solver="exact"),
    }
    tx = optax.partition(transforms, LABELS)
    updates, _ = jax.jit(tx.update)(stack(), tx.init(params()), params())
    w = oracle.reweight([stack()["w"]], [0], mu=1.0).update[0]
    b = oracle.reweight([stack()["b"]], [0], solver="exact").update[0]
    assert distance(updates, {"w": w, "b": b}) <= 1e-5


WRAPPERS = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step, **_: True),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, lambda step, **_: True),
}
every_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@pytest.mark.parametrize("leaves", [("w", "b"), ("w",)])
@pytest.mark.parametrize("k", [3, K])
@every_wrapper
def test_wrappers_the_wrong_way(wrap, k, leaves):
    """Never a stack in silence: the wrapper's own error, or the one about leading axes."""
    tx = wrap(optax.chain(bilevel_reweight(), optax.sgd(1.0)))
    grads, weights = ({name: tree[name] for name in leaves} for tree in (stack(k=k), params()))
    for arguments in ((), (weights,)):
        with pytest.raises((ValueError, TypeError), match="differ|leading axis|shape"):
            tx.update(grads, tx.init(weights), *arguments)


@every_wrapper
def test_wrappers_around_a_chain_that_stacks_by_itself(wrap):
    """Shape-preserving as a whole, so that any wrapper of optax's takes it."""
    spread = np.arange(1.0, K + 1, dtype=np.float32)

    def update(updates, params=None):
        return jax.tree.map(lambda g: jnp.stack([s * g for s in spread]), updates)

    tx = wrap(optax.chain(optax.stateless(update), bilevel_reweight(num_batches=K), optax.sgd(0.1)))
    grads = [jax.tree.map(lambda g, i=i: g[i], stack()) for i in (0, 1)]
    step, state, total = jax.jit(tx.update), tx.init(params()), params()
    for g in grads:
        updates, state = step(g, state, params())
        check_shapes(updates, params())
        total = optax.apply_updates(total, updates)
    if wrap is WRAPPERS["MultiSteps"]:
        grads = [jax.tree.map(lambda *g: sum(g) / 2, *grads)]
    expected = params()
    for g in grads:
        moved = reweighted(jax.tree.map(lambda x: np.stack([s * x for s in spread]), g))
        expected = jax.tree.map(lambda p, m: p - np.float32(0.1) * m, expected, moved)
    assert_close(total, expected)


def test_apply_if_finite_after_it():
    """A broken validation gradient gives a zero update, so that nothing is left to skip."""
    tx = optax.chain(bilevel_reweight(), optax.apply_if_finite(optax.sgd(1.0), 3))
    state = tx.init(params())
    updates, state = jax.jit(tx.update)(stack(), state, params())
    assert_close(updates, jax.tree.map(np.negative, reweighted(stack())))
    broken = jax.tree.map(lambda g: np.float32(np.nan) * g, stack())
    updates, state = jax.jit(tx.update)(broken, state, params())
    check_shapes(updates, params())
    assert distance(optax.apply_updates(params(), updates), params()) == 0
    assert optax.tree.get(state, "dropped") == K
    assert optax.tree.get(state, "notfinite_count") == 0


def test_multi_steps_after_it():
    tx = optax.chain(
        bilevel_reweight(), optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation()
    )
    state, update = tx.init(params()), jax.jit(tx.update)
    first, state = update(stack(0), state, params())
    second, state = update(stack(1), state, params())
    assert not any(np.any(x) for x in jax.tree.leaves(first))
    both = (reweighted(stack(0)), reweighted(stack(1)))
    assert_close(second, jax.tree.map(lambda x, y: -(x + y) / 2, *both))


def test_bilevel_multi_steps_in_a_chain_and_in_masked():
    """It takes ordinary gradients: what comes before sees mini-batches; masks go inside."""
    clipped = optax.chain(optax.clip(0.5), bilevel_multi_steps(optax.sgd(1.0), K))
    with pytest.raises(ValueError, match="Put masks inside, around the optimizer"):
        optax.masked(bilevel_multi_steps(optax.sgd(1.0), K), {"w": True, "b": False}).init(params())
    updates, state, update = None, clipped.init(params()), jax.jit(clipped.update)
    for i in range(K):
        updates, state = update(jax.tree.map(lambda g, i=i: g[i], stack()), state, params())
    expected = reweighted(jax.tree.map(lambda g: np.clip(g, -0.5, 0.5), stack()))
    assert_close(updates, jax.tree.map(np.negative, expected))


# --------------------------------------------------------------------------- optax.experimental


@pytest.mark.parametrize("as_aggregator", [False, True])
def test_aggregating_process(as_aggregator):
    """Clipping per mini-batch before, momentum after."""
    if not hasattr(optax, "experimental"):
        pytest.skip("optax < 0.2.7")
    aggregating = optax.experimental.aggregating
    reweight = bilevel_reweight(num_batches=K)
    if as_aggregator:
        reweight = aggregating.Aggregator(reweight.init, reweight.update)
    clip = jax.vmap(lambda g: optax.projections.projection_l2_ball(g, 1.0))
    tx = aggregating.process(
        optax.stateless(lambda grads, _: clip(grads)), reweight, optax.sgd(0.1, momentum=0.9)
    )
    state, update = tx.init(params()), jax.jit(tx.update)
    norms = np.sqrt(sum(np.sum(g**2, axis=tuple(range(1, g.ndim))) for g in stack().values()))
    assert (norms > 1).all()
    clipped = {name: (g.T / norms.astype(np.float32)).T for name, g in stack().items()}
    expected = reweighted(clipped)
    for factor in (-0.1, -0.19):
        updates, state = update(stack(), state, params())
        assert_close(updates, jax.tree.map(lambda x, f=factor: np.float32(f) * x, expected))
    assert optax.tree.get(state, "weights").shape == (K,)


# ------------------------------------------------------------------------------------------ Flax


def test_flax_train_state():
    """Its `apply_gradients` takes the stack, and a jitted, donated step descends."""
    tx = optax.chain(bilevel_reweight(), optax.sgd(0.1, momentum=0.9))
    state = train_state.TrainState.create(apply_fn=loss, params=params_of(), tx=tx)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batches):
        grads = jax.vmap(jax.grad(state.apply_fn), in_axes=(None, 0))(state.params, batches)
        return state.apply_gradients(grads=grads)

    before = np.mean(jax.vmap(loss, (None, 0))(params_of(), batches_of(8)))
    grads = stacked_gradients(params_of(), batches_of(8))
    updates, _ = tx.update(grads, tx.init(params_of()), params_of())
    state = step(state, batches_of(8))
    assert_close(state.params, optax.apply_updates(params_of(), updates))
    for _ in range(20):
        state = step(state, batches_of(8))
    assert state.step == 21
    assert np.mean(jax.vmap(loss, (None, 0))(state.params, batches_of(8))) < 0.7 * before


def test_nnx_optimizer():
    model = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    tx = optax.chain(bilevel_reweight(num_batches=4), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graphdef, start = nnx.split(nnx.clone(model), nnx.Param)
    batches = batches_of(4)

    def nnx_loss(params, batch):
        model = nnx.merge(graphdef, params, copy=True)
        return jnp.mean(jnp.square(model(batch["x"]) - batch["y"]))

    @nnx.jit
    def step(model, optimizer, batches):
        _, params = nnx.split(model, nnx.Param)
        grads = jax.vmap(jax.grad(nnx_loss), in_axes=(None, 0))(params, batches)
        optimizer.update(model, grads)

    _, grads, weights = bilevel_value_and_grad(nnx_loss)(start, batches)
    step(model, optimizer, batches)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, start, grads)
    assert_close(nnx.state(model, nnx.Param), expected)
    np.testing.assert_allclose(optimizer.opt_state[0].weights[...], weights, atol=1e-6)


def test_nnx_optimizer_over_the_stream():
    """`bilevel_value_and_grad` gives an ordinary gradient, for any optimizer."""
    model = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    graphdef, start = nnx.split(nnx.clone(model), nnx.Param)

    def nnx_loss(params, batch):
        model = nnx.merge(graphdef, params, copy=True)
        return jnp.mean(jnp.square(model(batch["x"]) - batch["y"]))

    batches = batches_of(4)
    step = jax.jit(bilevel_value_and_grad(nnx_loss))
    first, _, _ = step(start, batches)
    losses = first
    for _ in range(30):
        losses, grads, _ = step(nnx.state(model, nnx.Param), batches)
        optimizer.update(model, grads)
    assert np.mean(losses) < np.mean(first) / 2
