"""The state never changes its type, and nothing compiles twice; optax's own suites say the same.

optax's wheel ships two suites that every optimizer of its own must pass. Their methods are run
here on `bilevel_multi_steps` and `coherent_steps`, which take ordinary gradients, and on
`bilevel_reweight` behind a transformation that stacks copies of the gradient it gets (the update
for equal gradients is that gradient). Left out: `test_microbatch_with_explicit_sharding` (about
`optax.microbatching`) and `test_optimizers_accept_learning_rate_schedule...` (there is no learning
rate).
"""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_bilevel import bilevel_multi_steps, bilevel_reweight, coherent_steps
from tests.optax_bilevel.problems import slow, stack_of

K = 4


def params():
    return {"w": jnp.ones((3, 2)), "b": jnp.ones(5), "none": None}


def gradients(stacked, seed=0):
    w, b = stack_of(seed, [(3, 2), (5,)], K)
    tree = {"w": w, "b": b, "none": None}
    return jax.tree.map(jnp.asarray if stacked else lambda x: jnp.asarray(x[0]), tree)


class Case(NamedTuple):
    """A transformation, whether it takes a stack, and what its `update` is told beside it."""

    tx: optax.GradientTransformation
    stacked: bool
    extra: dict[str, Any]

    def update(self, grads, state, *params):
        return self.tx.update(grads, state, *params, **self.extra)


def held_out_losses(params):
    return jnp.stack([jnp.sum(params["w"]), -jnp.sum(jnp.square(params["w"])), jnp.float32(0)])


def stacks(k):
    """Hands k copies of the gradient to what follows in the chain."""

    def update(updates, params=None):
        return jax.tree.map(lambda g: jnp.stack([g] * k), updates)

    return optax.stateless(update)


ALIGNMENT = {"alignment": np.asarray([-1.0, 2.0, np.nan], np.float32)}
MOMENTUM = optax.sgd(0.1, momentum=0.9)
injected = optax.inject_hyperparams
CASES = {
    "reweight": Case(bilevel_reweight(), True, {}),
    "with weights": Case(bilevel_reweight(num_batches=K), True, {}),
    "exact": Case(bilevel_reweight(solver="exact", num_batches=K), True, {}),
    "per leaf": Case(bilevel_reweight(groups="leaf", num_batches=K), True, {}),
    "in a chain": Case(optax.chain(bilevel_reweight(), MOMENTUM), True, {}),
    "injected": Case(
        injected(bilevel_reweight)(mu=optax.constant_schedule(0.1), num_batches=K), True, {}
    ),
    "in MultiSteps": Case(
        optax.MultiSteps(
            optax.chain(stacks(K), bilevel_reweight(num_batches=K), MOMENTUM), 2
        ).gradient_transformation(),
        False,
        {},
    ),
    "multi_steps": Case(bilevel_multi_steps(MOMENTUM, 3), False, {}),
    "multi_steps per leaf": Case(bilevel_multi_steps(optax.adam(0.1), 3, groups="leaf"), False, {}),
    "coherent": Case(coherent_steps(MOMENTUM), False, {"losses_fn": held_out_losses}),
    "coherent by alignment": Case(
        coherent_steps(optax.adam(0.1), total_steps=100), False, ALIGNMENT
    ),
    "coherent injected": Case(
        injected(coherent_steps)(optax.adamw(0.1), total_steps=100), False, ALIGNMENT
    ),
    "coherent in MultiSteps": Case(
        optax.MultiSteps(coherent_steps(MOMENTUM), 2).gradient_transformation(), False, ALIGNMENT
    ),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
SOME = {name: CASES[name] for name in ("with weights", "in a chain", "multi_steps", "coherent")}
some = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=pytest.mark.slow if name == "multi_steps" else ())
        for name, case in SOME.items()
    ],
)


@pytest.fixture(autouse=True)
def strict_promotion():
    """Not here: adam and schedules are not strict themselves."""


def types(state):
    """Structure; and of every leaf shape, dtype, weak type and sharding type."""
    return jax.tree.map(jax.typeof, state)


def steps_of(case):
    """(params, state, grads) -> (params, state)."""

    def step(params, state, grads):
        updates, state = case.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def check_types(case, update):
    state = case.tx.init(params())
    start = types(state)
    for seed in range(4):
        updates, state = update(gradients(case.stacked, seed), state, params())
        assert types(state) == start
        assert types(updates) == types(params())


@every
def test_state_keeps_its_type(case):
    """And is compiled for once."""
    update: Any = jax.jit(lambda *arguments: case.update(*arguments))
    check_types(case, update)
    assert update._cache_size() == 1


@some
def test_state_keeps_its_type_without_jit(case):
    check_types(case, case.update)


@every
def test_init_under_jit_and_on_abstract_parameters(case):
    start = types(case.tx.init(params()))
    if hasattr(start, "hyperparams"):
        return  # there num_batches would be traced, and optax itself wants real arrays
    assert types(jax.jit(case.tx.init)(params())) == start
    assert types(case.tx.init(jax.eval_shape(params))) == start


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if "losses_fn" not in c.extra])
def test_parameters_may_be_left_out(name):
    case = CASES[name]
    update: Any = jax.jit(lambda *arguments: case.update(*arguments))
    if name in ("coherent injected", "in MultiSteps", "coherent in MultiSteps"):
        pytest.skip("optax's own weight decay and MultiSteps want them")
    state = case.tx.init(params())
    for seed in range(4):
        _, state = update(gradients(case.stacked, seed), state)
    assert update._cache_size() == 1


# ------------------------------------------------------------------------------------ donation


def addresses(*trees):
    leaves = jax.tree.leaves(trees)
    assert all(isinstance(x, jax.Array) for x in leaves)
    return [x.unsafe_buffer_pointer() for x in leaves if x.size]


@every
def test_no_two_leaves_are_one_array(case):
    weights = params()
    state = case.tx.init(weights)
    both = addresses(weights, state)
    assert len(set(both)) == len(both)
    if not hasattr(state, "hyperparams"):
        both = addresses(jax.jit(case.tx.init)(weights))
        assert len(set(both)) == len(both)
    weights, state = jax.jit(steps_of(case))(weights, state, gradients(case.stacked))
    both = addresses(weights, state)
    assert len(set(both)) == len(both)


def run_plain(step, params, state, grads):
    step = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(4):
        params, state = step(params, state, grads)
    return params, state


def run_keeping_unused(step, params, state, grads):
    step = jax.jit(step, donate_argnums=(0, 1), keep_unused=True)
    for _ in range(4):
        params, state = step(params, state, grads)
    return params, state


def run_scan(step, params, state, grads):
    def loop(params, state, grads):
        body = lambda carry, _: (step(*carry, grads), None)  # noqa: E731
        return jax.lax.scan(body, (params, state), length=4)[0]

    return jax.jit(loop, donate_argnums=(0, 1))(params, state, grads)


def run_cond(step, params, state, grads):
    def maybe(params, state, grads, do):
        return jax.lax.cond(
            do, step, lambda params, state, _: (params, state), params, state, grads
        )

    maybe = jax.jit(maybe, donate_argnums=(0, 1))
    for do in (False, True, True, False, True, True):
        params, state = maybe(params, state, grads, do)
    return params, state


def run_train_state(step, params, state, grads):
    def apply(state, grads):
        params, opt_state = step(state.params, state.opt_state, grads)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    tx = optax.GradientTransformation(lambda params: state, step)
    # Its step begins as a Python number, which would be compiled for twice.
    train = TrainState.create(apply_fn=None, params=params, tx=tx).replace(step=jnp.int32(0))
    apply = jax.jit(apply, donate_argnums=0)
    for _ in range(4):
        train = apply(train, grads)
    assert train.step == 4
    return train.params, train.opt_state


RUNS = [run_plain, run_keeping_unused, run_scan, run_cond, run_train_state]


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (run, name) if run is run_keeping_unused or name in SOME else slow(run, name)
        for run in RUNS
        for name in CASES
    ],
)
def test_fresh_parameters_and_state_may_be_donated(run, name):
    """In a plain jit, loops and conditions; with the same result as without."""
    case = CASES[name]
    step, grads = steps_of(case), gradients(case.stacked)
    expected = params(), case.tx.init(params())
    jitted = jax.jit(step)
    for _ in range(4):
        expected = jitted(*expected, grads)
    weights = params()
    actual = run(step, weights, case.tx.init(weights), grads)
    assert all(x.is_deleted() for x in jax.tree.leaves(weights))
    assert types(actual) == types(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


# -------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["per leaf", "in a chain", "multi_steps", "coherent by alignment"])
def test_state_keeps_its_type_on_a_mesh(name, axis_type):
    tx, stacked, extra = CASES[name]
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        weights = jax.device_put(np.ones((2, 4), np.float32), NamedSharding(mesh, P("x", "y")))
        grads = np.ones((K, 2, 4) if stacked else (2, 4), np.float32)
        spec = P(None, "x", "y") if stacked else P("x", "y")
        grads = jax.device_put(grads, NamedSharding(mesh, spec))
        state = tx.init(weights)
        start = types(state)
        assert types(jax.jit(tx.init)(weights)) == start
        update = jax.jit(functools.partial(tx.update, **extra))
        for _ in range(3):
            updates, state = update(grads, state, weights)
            assert types(state) == start
            assert jax.typeof(updates) == jax.typeof(weights)


# --------------------------------------------------------------------------- optax's own suites


def reweight_sgd(learning_rate):
    return optax.chain(stacks(K), bilevel_reweight(num_batches=K), optax.sgd(learning_rate))


def multi_steps_sgd(learning_rate):
    return bilevel_multi_steps(optax.sgd(learning_rate), 3)


def coherent_sgd(learning_rate):
    """Told that every held-out example gains."""
    tx = coherent_steps(optax.sgd(learning_rate))

    def update(updates, state, params=None, **extra_args):
        return tx.update(updates, state, params, alignment=-jnp.ones(2), **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


FACTORIES = {f.__name__: f for f in (reweight_sgd, multi_steps_sgd, coherent_sgd)}
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
