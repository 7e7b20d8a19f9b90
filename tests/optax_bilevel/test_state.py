"""The state never changes its type, and nothing compiles twice; optax's own suites say the same.

optax's wheel ships two suites that every optimizer of its own must pass. Their methods are run
here on `bilevel_multi_steps`, which takes ordinary gradients, and on `bilevel_reweight` behind a
transformation that stacks copies of the gradient it gets (the update for equal gradients is that
gradient). Left out: `test_microbatch_with_explicit_sharding` (about `optax.microbatching`) and
`test_optimizers_accept_learning_rate_schedule...` (there is no learning rate).
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_bilevel import bilevel_multi_steps, bilevel_reweight
from tests.optax_bilevel.problems import stack_of

K = 4


def params():
    return {"w": jnp.ones((3, 2)), "b": jnp.ones(5), "none": None}


def gradients(stacked, seed=0):
    w, b = stack_of(seed, [(3, 2), (5,)], K)
    tree = {"w": w, "b": b, "none": None}
    return jax.tree.map(jnp.asarray if stacked else lambda x: jnp.asarray(x[0]), tree)


TRANSFORMATIONS = {
    "reweight": (bilevel_reweight(), True),
    "with weights": (bilevel_reweight(num_batches=K), True),
    "exact": (bilevel_reweight(solver="exact", num_batches=K), True),
    "per leaf": (bilevel_reweight(groups="leaf", num_batches=K), True),
    "in a chain": (optax.chain(bilevel_reweight(), optax.sgd(0.1, momentum=0.9)), True),
    "injected": (
        optax.inject_hyperparams(bilevel_reweight)(mu=optax.constant_schedule(0.1), num_batches=K),
        True,
    ),
    "past": (bilevel_reweight(validation="past", num_batches=K), True),
    "multi_steps": (bilevel_multi_steps(optax.sgd(0.1, momentum=0.9), 3), False),
    "multi_steps per leaf": (bilevel_multi_steps(optax.adam(0.1), 3, groups="leaf"), False),
    "multi_steps past": (bilevel_multi_steps(optax.sgd(0.1), 3, validation="past"), False),
}
every = pytest.mark.parametrize(
    ("tx", "stacked"), TRANSFORMATIONS.values(), ids=list(TRANSFORMATIONS)
)


@pytest.fixture(autouse=True)
def strict_promotion():
    """Not here: adam and schedules are not strict themselves."""


def types(state):
    """Structure; and of every leaf shape, dtype, weak type and sharding type."""
    return jax.tree.map(jax.typeof, state)


def check_types(tx, stacked, update):
    state = tx.init(params())
    start = types(state)
    for seed in range(4):
        updates, state = update(gradients(stacked, seed), state, params())
        assert types(state) == start
        assert types(updates) == types(params())


@every
def test_state_keeps_its_type(tx, stacked):
    check_types(tx, stacked, jax.jit(tx.update))


@pytest.mark.parametrize("name", ["with weights", "multi_steps"])
def test_state_keeps_its_type_without_jit(name):
    tx, stacked = TRANSFORMATIONS[name]
    check_types(tx, stacked, tx.update)


@every
def test_init_under_jit_and_on_abstract_parameters(tx, stacked):
    del stacked
    start = types(tx.init(params()))
    if hasattr(start, "hyperparams"):
        return  # there num_batches would be traced, and optax itself wants real arrays
    assert types(jax.jit(tx.init)(params())) == start
    assert types(tx.init(jax.eval_shape(params))) == start


@every
@pytest.mark.parametrize("with_params", [True, False])
def test_nothing_compiles_twice(tx, stacked, with_params):
    update = jax.jit(lambda *arguments: tx.update(*arguments))
    state = tx.init(params())
    for seed in range(4):
        arguments = (params(),) if with_params else ()
        _, state = update(gradients(stacked, seed), state, *arguments)
    assert update._cache_size() == 1


@pytest.mark.parametrize(
    ("tx", "stacked"), [TRANSFORMATIONS["in a chain"], TRANSFORMATIONS["multi_steps"]]
)
def test_state_may_be_donated_and_carried_by_a_loop(tx, stacked):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def body(carry, _):
        return step.__wrapped__(*carry, gradients(stacked)), None

    donated, looped = (params(), tx.init(params())), (params(), tx.init(params()))
    for _ in range(3):
        # One buffer cannot be donated twice, and init may share its zeros.
        donated = step(*jax.tree.map(jnp.copy, donated), gradients(stacked))
    looped, _ = jax.lax.scan(body, looped, length=3)
    for x, y in zip(jax.tree.leaves(donated), jax.tree.leaves(looped), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["per leaf", "in a chain", "multi_steps", "past"])
def test_state_keeps_its_type_on_a_mesh(name, axis_type):
    tx, stacked = TRANSFORMATIONS[name]
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        weights = jax.device_put(np.ones((2, 4), np.float32), NamedSharding(mesh, P("x", "y")))
        grads = np.ones((K, 2, 4) if stacked else (2, 4), np.float32)
        spec = P(None, "x", "y") if stacked else P("x", "y")
        grads = jax.device_put(grads, NamedSharding(mesh, spec))
        state = tx.init(weights)
        start = types(state)
        assert types(jax.jit(tx.init)(weights)) == start
        update = jax.jit(tx.update)
        for _ in range(3):
            updates, state = update(grads, state, weights)
            assert types(state) == start
            assert jax.typeof(updates) == jax.typeof(weights)


# --------------------------------------------------------------------------- optax's own suites


def stacking(k):
    """Hands k copies of the gradient to what follows in the chain."""

    def update(updates, params=None):
        return jax.tree.map(lambda g: jnp.stack([g] * k), updates)

    return optax.stateless(update)


def reweight_sgd(learning_rate):
    return optax.chain(stacking(K), bilevel_reweight(num_batches=K), optax.sgd(learning_rate))


def multi_steps_sgd(learning_rate):
    return bilevel_multi_steps(optax.sgd(learning_rate), 3)


FACTORIES = {"reweight_sgd": reweight_sgd, "multi_steps_sgd": multi_steps_sgd}
SHARDING = (
    "test_init_with_abstract_input",
    "test_state_sharding_type_init_match_update",
    "test_state_sharding_type_preserved_with_jit",
)
COMMON = {
    "test_optimizers_accept_extra_args": [{"wrap": False}],
    "test_optimizers": [{"target": "_setup_parabola", "dtype": "float32"}],
    "test_optimizers_can_be_wrapped_in_inject_hyperparams": [{}],
    "test_preserve_dtype": [{"dtype": "bfloat16"}, {"dtype": "float32"}],
    "test_gradient_accumulation": [{"dtype": "bfloat16"}],
    "test_state_shape_dtype_shard_stability": [
        {"dtype": jnp.float16},
        {"dtype": jnp.bfloat16},
        {"dtype": jnp.float64},
    ],
}


def original(suite, name):
    """The method as written, before absl multiplied it by optax's list of optimizers."""
    for attribute, value in vars(suite).items():
        if attribute.startswith(name) and hasattr(value, "__wrapped__"):
            method = value
            while hasattr(method, "__wrapped__"):
                method = method.__wrapped__
            if method.__name__ == name:
                return method
    raise AssertionError(f"optax ships no {name} any more")


@pytest.fixture
def shipped(monkeypatch):
    """Imports a suite of optax's, where the wheel has it."""

    def load(name):
        monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # a suite sets it for itself
        # optax 0.2.8 compares versions as strings and would skip tests on "0.10".
        monkeypatch.setattr(jax, "__version__", "0.9")
        return pytest.importorskip(name, reason="this optax ships no tests")

    return load


@pytest.mark.parametrize("name", SHARDING)
@pytest.mark.parametrize("factory", FACTORIES)
def test_optax_sharding_suite(shipped, factory, name):
    suite = shipped("optax._src.sharding_test").ShardingTest
    original(suite, name)(suite(), FACTORIES[factory](1.0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id=f"{name} {' '.join(map(str, options.values()))}")
        for name, cases in COMMON.items()
        for options in cases
    ],
)
@pytest.mark.parametrize("factory", FACTORIES)
def test_optax_common_suite(shipped, monkeypatch, factory, name, options):
    if (factory, name) == ("reweight_sgd", "test_gradient_accumulation"):
        pytest.skip("optax.MultiSteps goes after the reweighting: test_compositions.py")
    module = shipped("optax.contrib._common_test")
    monkeypatch.setattr(module.contrib, factory, FACTORIES[factory], raising=False)
    if "target" in options:
        options = {**options, "target": getattr(module, options["target"])}
    suite = module.ContribTest
    original(suite, name)(
        suite(),
        opt_name=factory,
        opt_kwargs={"learning_rate": 1e-2},
        wrapper_name=None,
        wrapper_kwargs=None,
        **options,
    )
