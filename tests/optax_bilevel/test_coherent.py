"""Steps cross-validated by held-out examples: against NumPy, in every loop, and at the edges."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_bilevel
from optax_bilevel import _coherent
from tests.optax_bilevel.problems import (
    assert_close,
    batches_of,
    distance,
    outputs,
    params_of,
    slow,
)

MOMENTUM = optax.sgd(0.1, momentum=0.9)


@pytest.fixture(autouse=True)
def strict_promotion():
    """Not here: optax's adamw and the networks' libraries are not strict themselves."""


def losses(params, batch):
    return jnp.mean(jnp.square(outputs(params, batch["x"]) - batch["y"]), axis=-1)


@functools.cache
def pool():
    return jax.tree.map(lambda x: np.asarray(x[0]), batches_of(1, 4096))


def examples(n, seed=1):
    """Of one problem, other ones for every seed."""
    chosen = np.random.default_rng(seed).integers(0, 4096, n)
    return jax.tree.map(lambda x: jnp.asarray(x[chosen]), pool())


def step_of(tx: Any, losses=losses):
    """The README's loop body: (params, state, batch, held_out) -> (params, state)."""

    def step(params, state, batch, held_out):
        grads = jax.grad(lambda p: losses(p, batch).mean())(params)
        updates, state = tx.update(grads, state, params, losses_fn=lambda p: losses(p, held_out))
        return optax.apply_updates(params, updates), state

    return step


def run(tx: Any, params=None, steps=4, losses=losses, jit=True) -> tuple[Any, Any]:
    params = params_of() if params is None else params
    state = tx.init(params)
    step = jax.jit(step_of(tx, losses)) if jit else step_of(tx, losses)
    for i in range(steps):
        params, state = step(params, state, examples(8, i), examples(6, 100 + i))
    return params, state


def judged(state):
    """The scalars of a `CoherentStepsState`, wherever it is."""
    is_ours = lambda x: isinstance(x, optax_bilevel.CoherentStepsState)  # noqa: E731
    (ours,) = filter(is_ours, jax.tree.leaves(state, is_leaf=is_ours))
    names = ("count", "agreement", "variance", "step_size", "excluded")
    return {name: np.asarray(getattr(ours, name)) for name in names}


# ------------------------------------------------------------------------------- the formula


class Judge:
    """The rule in float64, from the equations of the documentation."""

    def __init__(self, horizon):
        self.rate = min(1 / horizon, 1)
        self.mean, self.variance, self.factor = 1.0, 0.0, 1.0

    def __call__(self, gains):
        gains = gains[np.isfinite(gains)]
        if np.any(gains):
            self.move(gains)
        return self.factor

    def move(self, gains):
        bound = _coherent._LARGEST * np.median(np.abs(gains[gains != 0]))
        gains = np.clip(gains, -bound, bound)
        s = np.sum(gains) / np.sum(np.abs(gains))
        off = s - self.mean
        self.mean += self.rate * off
        self.variance = (1 - self.rate) * (self.variance + self.rate * off**2)
        # The deviation of an exponential average of independent s.
        deviation = np.sqrt(self.variance * self.rate / (2 - self.rate))
        evidence = self.mean / deviation if deviation else np.sign(self.mean) * np.inf
        change = np.clip(evidence - _coherent._MARGIN, -1, 1)
        self.factor *= np.exp(change * self.rate)
        self.factor = float(np.clip(self.factor, _coherent._SMALLEST, 1))


def regression(seed, n, noise):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 6))
    return x, x @ np.linspace(-1, 1, 6) + noise * rng.normal(size=n)


def squares(w, batch):
    x, y = batch
    return jnp.square(x @ w - y)


def gradients(w, batch):
    x, y = batch
    return 2 * (x @ w - y)[:, None] * x


@pytest.mark.parametrize("total_steps", [None, 3000, 60])
def test_momentum_sgd_against_the_formula(total_steps):
    """Half the way there is noise alone: steps shrink, grow again, and are those of NumPy."""
    horizon = _coherent._STEPS if total_steps is None else _coherent._HORIZON * total_steps
    rate, momentum, steps = 0.02, 0.9, 160
    opt = optax.sgd(rate, momentum=momentum)
    tx: Any = optax_bilevel.coherent_steps(opt, total_steps=total_steps)
    step: Any = jax.jit(step_of(tx, squares))
    params, w = jnp.zeros(6), np.zeros(6)
    state, judge = tx.init(params), Judge(horizon)
    direction, trace, factors = np.zeros(6), np.zeros(6), []
    for i in range(steps):
        noise = 3.0 if i < steps / 2 else 0.0
        batch, held_out = regression(i, 8, noise), regression(1000 + i, 16, noise)
        narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (batch, held_out))
        params, state = step(params, state, *narrow)

        factors.append(judge(-gradients(w, held_out) @ direction))
        trace = momentum * trace + gradients(w, batch).mean(axis=0)
        proposal = -rate * trace
        w = w + factors[-1] * proposal
        direction = _coherent._DECAY * direction + (1 - _coherent._DECAY) * proposal

        np.testing.assert_allclose(state.step_size, factors[-1], rtol=1e-3)
        np.testing.assert_allclose(state.agreement, judge.mean, atol=1e-4)
        np.testing.assert_allclose(state.variance, judge.variance, atol=1e-4)
    np.testing.assert_allclose(params, w, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(state.direction, direction, rtol=1e-3, atol=1e-5)
    assert (int(state.count), int(state.excluded), step._cache_size()) == (steps, 0, 1)
    assert factors[0] == 1 > 0.8 > min(factors)
    assert total_steps is None or np.any(np.diff(factors) > 0)


def test_examples_that_gain_keep_steps_whole_and_others_end_them():
    tx: Any = optax_bilevel.coherent_steps(optax.sgd(1.0), total_steps=1000)
    for sign, factor in ((-1.0, 1.0), (1.0, _coherent._SMALLEST)):
        updates, state = jnp.zeros(2), tx.init(jnp.zeros(2))
        update = jax.jit(lambda g, s, a: tx.update(g, s, alignment=a))
        for _ in range(200):
            updates, state = update(jnp.ones(2), state, sign * jnp.ones(16))
        np.testing.assert_allclose(state.step_size, factor, rtol=1e-5)
        np.testing.assert_allclose(updates, -factor * np.ones(2), rtol=1e-5)
        np.testing.assert_allclose(state.agreement, -sign, atol=1e-3)


def test_one_example_counts_for_a_few_medians_at_most():
    tx: Any = optax_bilevel.coherent_steps(optax.sgd(1.0), total_steps=1)
    gains = np.asarray([1, 2, 3, -1000], np.float32)
    _, state = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)), alignment=-gains)
    bound = _coherent._LARGEST * 2.5
    np.testing.assert_allclose(state.agreement, (6 - bound) / (6 + bound), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e37])
def test_gains_of_any_size(size):
    """Whose sum may be no number of float32."""
    tx: Any = optax_bilevel.coherent_steps(optax.sgd(1.0), total_steps=1)
    alignment = np.float32(size) * np.asarray([-1, -1, 1] * 50, np.float32)
    _, state = tx.update(jnp.ones(2), tx.init(jnp.zeros(2)), alignment=alignment)
    np.testing.assert_allclose(state.agreement, 1 / 3, rtol=1e-6)


def test_wrong_labels_are_not_memorised():
    """Nearly half of them wrong, and enough parameters to learn them all by heart."""
    training, held_out, steps = slice(0, 1000), slice(1000, 1100), 3000
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 20))
    classes = rng.integers(0, 4, 2100)
    x = (centres[classes] + rng.normal(size=(2100, 20))).astype(np.float32)
    given = np.where(rng.random(2100) < 0.6, rng.integers(0, 4, 2100), classes)
    start = [rng.normal(size=s) / np.sqrt(s[0]) for s in ((20, 128), (128, 4))]
    start = [jnp.asarray(w, jnp.float32) for w in start]
    numbers = (
        rng.integers(training.start, training.stop, (steps, 32)),
        rng.integers(held_out.start, held_out.stop, (steps, 16)),
    )

    def logits(params, x):
        return jax.nn.relu(x @ params[0]) @ params[1]

    def cross_entropy(params, batch):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch[0]), batch[1])

    def train(tx, **judges):
        def body(carry, numbers):
            params, state = carry
            batch, others = ((jnp.asarray(x)[i], jnp.asarray(given)[i]) for i in numbers)
            grads = jax.grad(lambda p: cross_entropy(p, batch).mean())(params)
            extra = {name: judge(others) for name, judge in judges.items()}
            updates, state = tx.update(grads, state, params, **extra)
            return (optax.apply_updates(params, updates), state), None

        loop = jax.jit(lambda carry: jax.lax.scan(body, carry, numbers)[0][0])
        predicted = np.argmax(logits(loop((start, tx.init(start))), x), axis=1)
        fitted = np.mean(predicted[training] == given[training])
        return np.mean(predicted[held_out.stop :] == classes[held_out.stop :]), fitted

    opt = optax.sgd(0.03, momentum=0.9)
    plain, plain_fitted = train(opt)
    ours, ours_fitted = train(
        optax_bilevel.coherent_steps(opt, total_steps=steps),
        losses_fn=lambda others: lambda params: cross_entropy(params, others),
    )
    assert plain_fitted > 0.95
    assert ours_fitted < 0.7
    assert ours > plain + 0.1


# -------------------------------------------------- the README's two lines, in every library


class Model(NamedTuple):
    """Parameters, and losses(params, batch) -> [n]."""

    params: Any
    losses: Any


def bare():
    return Model(params_of(), losses)


def equinox():
    model = eqx.nn.MLP(5, 3, 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def losses(params, batch):
        model = eqx.combine(params, static)
        return jnp.mean(jnp.square(jax.vmap(model)(batch["x"]) - batch["y"]), axis=-1)

    return Model(params, losses)


def haiku():
    def forward(x):
        return hk.Linear(3)(jax.nn.relu(hk.Linear(8)(x)))

    network = hk.without_apply_rng(hk.transform(forward))

    def losses(params, batch):
        return jnp.mean(jnp.square(network.apply(params, batch["x"]) - batch["y"]), axis=-1)

    return Model(network.init(jax.random.key(0), jnp.ones((1, 5))), losses)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(8)(x)))


def linen():
    def losses(params, batch):
        return jnp.mean(jnp.square(Linen().apply(params, batch["x"]) - batch["y"]), axis=-1)

    return Model(Linen().init(jax.random.key(0), jnp.ones((1, 5))), losses)


class BatchNormed(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def nnx_losses(model, batch):
    return jnp.mean(jnp.square(model(batch["x"]) - batch["y"]), axis=-1)


def train_by_functions(model, place, donate, steps):
    """(mean loss before, after, what `judged` finds) of the two lines in a jitted step."""
    tx = optax_bilevel.coherent_steps(optax.adamw(3e-2), total_steps=1000)
    step = jax.jit(step_of(tx, model.losses), donate_argnums=(0, 1) if donate else ())
    params = place(jax.tree.map(jnp.copy, model.params), P())
    whole, state = place(examples(64), P("data")), tx.init(params)
    before = float(model.losses(params, whole).mean())
    for i in range(steps):
        params, state = step(params, state, whole, place(examples(16, 100 + i), P("data")))
    return before, float(model.losses(params, whole).mean()), judged(state)


def train_linen(place, donate, steps):
    """The same with a `TrainState`, whose `apply_gradients` hands no keywords on to optax."""
    model, tx = linen(), optax_bilevel.coherent_steps(optax.adamw(3e-2), total_steps=1000)

    def step(state, batch, held_out):
        params, opt_state = step_of(tx, model.losses)(
            state.params, state.opt_state, batch, held_out
        )
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    step = jax.jit(step, donate_argnums=0 if donate else ())
    params = place(jax.tree.map(jnp.copy, model.params), P())
    state = TrainState.create(apply_fn=None, params=params, tx=tx).replace(step=jnp.int32(0))
    whole = place(examples(64), P("data"))
    before = float(model.losses(params, whole).mean())
    for i in range(steps):
        state = step(state, whole, place(examples(16, 100 + i), P("data")))
    return before, float(model.losses(state.params, whole).mean()), judged(state.opt_state)


def train_nnx(place, donate, steps):
    model = BatchNormed()
    nnx.update(model, place(nnx.state(model), P()))
    tx = optax_bilevel.coherent_steps(optax.adamw(3e-2), total_steps=1000)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @functools.partial(nnx.jit, donate_argnums=(0, 1) if donate else ())
    def step(model, optimizer, batch, held_out):
        loss, grads = nnx.value_and_grad(lambda m: nnx_losses(m, batch).mean())(model)
        graph, _, rest = nnx.split(model, nnx.Param, ...)

        def losses_fn(params):  # in training mode; the new averages are thrown away
            return nnx_losses(nnx.merge(graph, params, rest, copy=True), held_out)

        optimizer.update(model, grads, losses_fn=losses_fn)
        return loss

    whole, found = place(examples(64), P("data")), []
    for i in range(steps):
        found.append(float(step(model, optimizer, whole, place(examples(16, 100 + i), P("data")))))
    return found[0], found[-1], judged(optimizer.opt_state)


TRAININGS = {
    "bare": lambda *a: train_by_functions(bare(), *a),
    "equinox": lambda *a: train_by_functions(equinox(), *a),
    "haiku": lambda *a: train_by_functions(haiku(), *a),
    "linen": train_linen,
    "nnx": train_nnx,
}


@functools.cache
def on_one_device(name, donate=False, steps=15):
    return TRAININGS[name](lambda tree, spec: tree, donate, steps)


def assert_same_training(actual, expected):
    np.testing.assert_allclose(actual[:2], expected[:2], rtol=1e-3)
    for field, x in actual[2].items():
        np.testing.assert_allclose(x, expected[2][field], rtol=1e-2, atol=1e-3, err_msg=field)


@pytest.mark.parametrize("name", TRAININGS)
def test_two_lines_train_any_model(name):
    before, after, state = on_one_device(name)
    assert after < 0.6 * before
    assert state["count"] == 15
    assert state["excluded"] == 0
    assert_same_training(on_one_device(name, True), on_one_device(name))


@pytest.mark.parametrize(
    ("name", "axis_type", "donate"),
    [
        (name, axis_type, donate)
        if (donate, axis_type) == (True, AxisType.Auto) or (name == "bare" and donate)
        else slow(name, axis_type, donate)
        for name in TRAININGS
        for axis_type in (AxisType.Auto, AxisType.Explicit)
        for donate in (False, True)
    ],
)
def test_two_lines_on_a_mesh(name, axis_type, donate):
    """Batches sharded over eight devices, and nothing else changed."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))

    def place(tree, spec):
        return jax.device_put(tree, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        assert_same_training(TRAININGS[name](place, donate, 15), on_one_device(name))


def test_batch_statistics_are_those_of_training_alone():
    """The losses of held-out examples leave the model's own averages as they were."""
    model = BatchNormed()
    optimizer = nnx.Optimizer(model, optax_bilevel.coherent_steps(MOMENTUM), wrt=nnx.Param)
    graph, _, rest = nnx.split(model, nnx.Param, ...)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))

    def losses_fn(params):
        return nnx_losses(nnx.merge(graph, params, rest, copy=True), examples(16))

    grads = nnx.grad(lambda params: losses_fn(params).mean())(nnx.state(model, nnx.Param))
    for _ in range(2):
        optimizer.update(model, grads, losses_fn=losses_fn)
    assert_close(nnx.state(model, nnx.BatchStat), before)
    # Its state lives in other containers than the parameters, and is a direction all the same.
    direction = optimizer.opt_state.direction
    assert jax.tree.structure(direction) != jax.tree.structure(nnx.state(model, nnx.Param))
    aligned = optax_bilevel.example_alignment(
        lambda p, _: losses_fn(p), nnx.state(model, nnx.Param), None, direction
    )
    assert aligned.sum() < 0  # examples gain by what was trained on them


# ------------------------------------------------------------------------------- mapped axes


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("axes", [("data",), ("x", "y")])
def test_shard_map(axes, check_vma):
    """Held-out examples over devices, gradients averaged by the caller: as on one device."""
    mesh = jax.make_mesh(
        (8,) if len(axes) == 1 else (2, 4), axes, axis_types=(AxisType.Auto,) * len(axes)
    )
    tx: Any = optax_bilevel.coherent_steps(MOMENTUM, total_steps=500, axis_name=axes)

    def on_device(params, state, batch, held_out):
        varying = jax.lax.pcast(params, axes, to="varying") if check_vma else params
        grads = jax.grad(lambda p: losses(p, batch).mean())(varying)
        updates, state = tx.update(
            jax.lax.pmean(grads, axes), state, params, losses_fn=lambda p: losses(p, held_out)
        )
        return optax.apply_updates(params, updates), state

    specs = {"in_specs": (P(), P(), P(axes), P(axes)), "out_specs": P(), "check_vma": check_vma}
    mapped = jax.jit(jax.shard_map(on_device, mesh=mesh, **specs))
    alone = optax_bilevel.coherent_steps(MOMENTUM, total_steps=500)
    single = jax.jit(step_of(alone))
    ours = theirs = params_of(), tx.init(params_of())
    for i in range(6):
        held_out = examples(16, 100 + i)
        held_out["y"] = held_out["y"].at[5].set(jnp.nan)
        ours = mapped(*ours, examples(16, i), held_out)
        theirs = single(*theirs, examples(16, i), held_out)
    assert_close(ours, theirs, 1e-5)
    assert int(ours[1].excluded) == 1


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_pmap():
    tx = optax_bilevel.coherent_steps(MOMENTUM, total_steps=500, axis_name="data")

    def on_device(params, state, batch, held_out):
        grads = jax.grad(lambda p: losses(p, batch).mean())(params)
        updates, state = tx.update(
            jax.lax.pmean(grads, "data"), state, params, losses_fn=lambda p: losses(p, held_out)
        )
        return optax.apply_updates(params, updates), state

    mapped = jax.pmap(on_device, "data", in_axes=(0, 0, 0, 0))
    single = jax.jit(step_of(optax_bilevel.coherent_steps(MOMENTUM, total_steps=500)))
    theirs = params_of(), tx.init(params_of())
    ours = jax.tree.map(lambda x: jnp.stack([x] * 8), theirs)
    for i in range(3):
        batches = examples(16, i), examples(16, 100 + i)
        ours = mapped(*ours, *jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batches))
        theirs = single(*theirs, *batches)
    for device in (0, 7):
        assert_close(jax.tree.map(lambda x, d=device: x[d], ours), theirs, 1e-5)


# ------------------------------------------------------------------------- the rest of optax


def test_in_a_chain():
    """What comes before sees the gradient; what comes after, the scaled step."""
    ours, state = run(
        optax.chain(optax.clip_by_global_norm(0.1), optax_bilevel.coherent_steps(MOMENTUM))
    )
    inside, _ = run(
        optax_bilevel.coherent_steps(optax.chain(optax.clip_by_global_norm(0.1), MOMENTUM))
    )
    assert_close(ours, inside)
    assert optax.tree.get(state, "step_size") == 1
    assert len(optax.tree.get_all_with_path(state, "direction")) == 1
    assert distance(ours, run(optax_bilevel.coherent_steps(MOMENTUM))[0]) > 1e-3


def test_inside_multi_steps():
    """Called once in two: by the mean gradient, and by the held-out examples of that call."""
    tx = optax_bilevel.coherent_steps(MOMENTUM)
    ours, state = run(optax.MultiSteps(tx, 2).gradient_transformation(), steps=6)

    @jax.jit
    def twice(params, inner, batches, held_out):
        grads = [jax.grad(lambda p, b=b: losses(p, b).mean())(params) for b in batches]
        grads = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
        updates, inner = tx.update(grads, inner, params, losses_fn=lambda p: losses(p, held_out))
        return optax.apply_updates(params, updates), inner

    params, inner = params_of(), tx.init(params_of())
    for i in (1, 3, 5):
        batches = examples(8, i - 1), examples(8, i)
        params, inner = twice(params, inner, batches, examples(6, 100 + i))
    assert_close((ours, state.inner_opt_state), (params, inner), 1e-5)


def test_around_multi_steps():
    """Proposals are zero in between; each is judged all the same."""
    inner = optax.MultiSteps(MOMENTUM, 2).gradient_transformation()
    ours, state = run(optax_bilevel.coherent_steps(inner), steps=6)
    plain = params_of(), inner.init(params_of())
    for i in range(6):
        grads = jax.grad(lambda p, i=i: losses(p, examples(8, i)).mean())(plain[0])
        updates, opt_state = inner.update(grads, plain[1], plain[0])
        plain = optax.apply_updates(plain[0], updates), opt_state
    assert int(state.count) == 6
    assert state.step_size == 1
    assert_close(ours, plain[0], 1e-5)


@pytest.mark.parametrize("jit", [True, False])
def test_inject_hyperparams(jit):
    """Both ways: the length of the training, and a learning rate inside."""
    expected = run(optax_bilevel.coherent_steps(MOMENTUM, total_steps=200))
    injected = optax.inject_hyperparams(optax_bilevel.coherent_steps)(MOMENTUM, total_steps=200)

    @optax.inject_hyperparams
    def factory(learning_rate, total_steps):
        opt = optax.sgd(learning_rate, momentum=0.9)
        return optax_bilevel.coherent_steps(opt, total_steps=total_steps)

    scheduled = factory(optax.constant_schedule(0.1), total_steps=200)
    for tx in (injected, scheduled):
        params, state = run(tx, jit=jit)
        assert_close((params, judged(state)), (expected[0], judged(expected[1])), 1e-5)
        assert state.hyperparams["total_steps"] == 200
    jitted = jax.jit(injected.init)(params_of())
    assert jax.tree.map(jax.typeof, jitted) == jax.tree.map(jax.typeof, injected.init(params_of()))


def test_a_learning_rate_that_is_set_between_steps():
    @optax.inject_hyperparams
    def factory(learning_rate):
        return optax_bilevel.coherent_steps(optax.sgd(learning_rate))

    tx: Any = factory(0.1)
    state = tx.init(params_of())
    state.hyperparams["learning_rate"] = jnp.float32(0)
    grads = jax.grad(lambda p: losses(p, examples(4)).mean())(params_of())
    updates, _ = tx.update(grads, state, params_of(), losses_fn=lambda p: losses(p, examples(4)))
    assert all(not np.any(x) for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("around", [True, False])
def test_apply_if_finite(around):
    """A gradient that is not finite takes no part, and training goes on."""

    def wrap(opt):
        tx = optax_bilevel.coherent_steps(opt if around else optax.apply_if_finite(opt, 3))
        return optax.apply_if_finite(tx, 3) if around else tx

    tx = wrap(MOMENTUM)
    state, params = tx.init(params_of()), params_of()
    step = jax.jit(step_of(tx))
    for i in range(3):
        before, batch = params, examples(8, i)
        batch["x"] = batch["x"] * (jnp.nan if i == 1 else 1.0)
        params, state = step(params, state, batch, examples(6, 100 + i))
        assert np.isfinite(distance(params, before))
        assert (distance(params, before) == 0) == (i == 1)
    assert optax.tree.get(state, "total_notfinite") == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(optax.tree.get(state, "direction")))


def test_masks_go_inside():
    labels = {"gain": "frozen", "layer": {"bias": "train", "kernel": "train"}, "shift": "frozen"}
    parted = optax.partition({"train": MOMENTUM, "frozen": optax.set_to_zero()}, labels)
    params, state = run(optax_bilevel.coherent_steps(parted))
    assert params["gain"] == params_of()["gain"]
    assert not np.any(state.direction["gain"])
    assert np.any(state.direction["layer"]["bias"])
    decay = optax.add_decayed_weights(0.1, mask=jax.tree.map(lambda x: x == "train", labels))
    run(optax_bilevel.coherent_steps(optax.chain(decay, MOMENTUM)))


def test_masks_around_it_would_hide_parameters_from_the_losses():
    tx = optax_bilevel.coherent_steps(MOMENTUM)
    message = r"leaf \['shift'\] is hidden by optax.masked or optax.partition.* inside"
    mask = {"gain": True, "layer": True, "shift": False}
    with pytest.raises(ValueError, match=message):
        optax.masked(tx, mask).init(params_of())
    labels = jax.tree.map(lambda x: "train" if x else "frozen", mask)
    with pytest.raises(ValueError, match=message):
        optax.partition({"train": tx, "frozen": optax.set_to_zero()}, labels).init(params_of())


def test_other_keywords_reach_the_optimizer():
    def by_value(updates, state, params=None, **extra_args):
        return jax.tree.map(lambda x: -extra_args["value"] * x, updates), state

    opt = optax.GradientTransformationExtraArgs(optax.init_empty_state, by_value)
    tx = optax_bilevel.coherent_steps(opt)
    updates, _ = tx.update(
        jnp.ones(2), tx.init(jnp.zeros(2)), alignment=-jnp.ones(3), value=jnp.float32(3)
    )
    np.testing.assert_array_equal(updates, [-3, -3])


# -------------------------------------------------------------------------- scan, vmap, dtypes


def test_scan():
    tx = optax_bilevel.coherent_steps(MOMENTUM, total_steps=500)
    batches, others = batches_of(5, 8, 3), batches_of(5, 6, 4)

    def body(carry, both):
        return step_of(tx)(*carry, *both), None

    start = params_of(), tx.init(params_of())
    looped, _ = jax.jit(lambda start: jax.lax.scan(body, start, (batches, others)))(start)
    step, carry = jax.jit(step_of(tx)), start
    for i in range(5):
        carry = step(*carry, *jax.tree.map(lambda x, i=i: x[i], (batches, others)))
    assert_close(looped, carry, 1e-5)


def test_vmap_over_seeds():
    tx: Any = optax_bilevel.coherent_steps(optax.adamw(0.01), total_steps=500)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(params_of(seed) for seed in range(3)))
    state = jax.vmap(tx.init)(stacked)
    step = jax.jit(jax.vmap(step_of(tx), in_axes=(0, 0, None, 0)))
    single = jax.jit(step_of(tx))
    alone = params_of(2), tx.init(params_of(2))
    for i in range(3):
        others = jax.tree.map(lambda x: x.reshape(3, 6, -1), examples(18, 100 + i))
        stacked, state = step(stacked, state, examples(8, i), others)
        alone = single(*alone, examples(8, i), jax.tree.map(lambda x: x[2], others))
    assert state.step_size.shape == (3,)
    assert_close(jax.tree.map(lambda x: x[2], (stacked, state)), alone, 1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_parameters(dtype):
    """Sums and the direction in float32, the update in the parameters' dtype."""
    narrow = jax.tree.map(lambda x: x.astype(dtype), params_of())

    def in_float32(params, batch):
        return losses(jax.tree.map(lambda x: x.astype(jnp.float32), params), batch)

    tx = optax_bilevel.coherent_steps(optax.sgd(0.1), total_steps=500)
    params, state = run(tx, narrow, losses=in_float32)
    assert all(x.dtype == dtype for x in jax.tree.leaves(params))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.direction))
    expected = run(tx, jax.tree.map(lambda x: x.astype(jnp.float32), narrow))
    assert distance(params, expected[0]) < 1e-2
    np.testing.assert_allclose(state.agreement, expected[1].agreement, atol=0.05)


def test_complex_parameters():
    def energy(z, batch):
        off = batch @ z - (1 + 2j)
        return jnp.real(off * jnp.conj(off))

    tx: Any = optax_bilevel.coherent_steps(optax.sgd(0.1), total_steps=50)
    z, x = jnp.zeros(2, jnp.complex64), jnp.asarray([[1.0, 1j], [1, 0], [0.5, 1]], jnp.complex64)
    state, start = tx.init(z), energy(z, x).mean()
    for _ in range(30):
        grads = jnp.conj(jax.grad(lambda z: energy(z, x).mean())(z))
        updates, state = tx.update(grads, state, z, losses_fn=lambda z: energy(z, x))
        z = optax.apply_updates(z, updates)
    assert jax.typeof(z).dtype == state.direction.dtype == jnp.complex64
    assert state.agreement.dtype == jnp.float32
    assert energy(z, x).mean() < 0.6 * start


def test_float64_parameters():
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params_of())
        params, state = run(optax_bilevel.coherent_steps(MOMENTUM, total_steps=500), wide)
        assert all(x.dtype == np.float64 for x in jax.tree.leaves((params, state.direction)))
        assert state.agreement.dtype == state.step_size.dtype == np.float32
    expected = run(optax_bilevel.coherent_steps(MOMENTUM, total_steps=500))
    assert distance(params, expected[0]) < 1e-5


# ------------------------------------------------------------------------- what each input gets


def update_by(gains, steps=1, total_steps=20, start=None) -> tuple[Any, Any]:
    tx = optax_bilevel.coherent_steps(optax.sgd(1.0), total_steps=total_steps)
    state = tx.init(jnp.zeros(2)) if start is None else start
    updates = None
    for _ in range(steps):
        updates, state = tx.update(jnp.ones(2), state, alignment=-np.asarray(gains, np.float32))
    return updates, state


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_held_out_example_that_is_not_finite_is_left_out_and_counted(bad):
    _, with_it = update_by([1, -2, bad, -1, bad], steps=3)
    _, without = update_by([1, -2, -1], steps=3)
    assert int(with_it.excluded) == 2
    assert int(without.excluded) == 0
    assert_close(with_it._replace(excluded=without.excluded), without)


def test_a_loss_that_is_not_finite_is_left_out():
    tx = optax_bilevel.coherent_steps(MOMENTUM, total_steps=50)
    spoilt, clean = examples(6), examples(6)
    spoilt["y"] = spoilt["y"].at[3].set(jnp.nan)
    clean = jax.tree.map(lambda x: jnp.delete(x, 3, axis=0), clean)
    step = jax.jit(step_of(tx))
    carry = step(params_of(), tx.init(params_of()), examples(8), clean)
    ours, expected = step(*carry, examples(8), spoilt), step(*carry, examples(8), clean)
    assert int(ours[1].excluded) == 1
    assert_close(ours[1]._replace(excluded=expected[1].excluded), expected[1])
    assert_close(ours[0], expected[0])


@pytest.mark.parametrize("gains", [[np.nan, np.inf], [], [0.0, 0.0], [[0.0], [np.nan]]])
def test_without_a_say_the_step_size_stays(gains):
    _, before = update_by([1, -2, -3], steps=5)
    updates, after = update_by(gains, start=before)
    assert 0 < before.step_size < 1
    np.testing.assert_allclose(updates, -before.step_size * np.ones(2), rtol=1e-6)
    for name in ("agreement", "variance", "step_size"):
        assert getattr(after, name) == getattr(before, name)
    assert int(after.count) == 6
    assert int(after.excluded) == np.sum(~np.isfinite(gains))


def test_nothing_has_moved_yet():
    """The direction is zero at the first step, which is whole."""
    params, state = run(optax_bilevel.coherent_steps(optax.sgd(0.1), total_steps=1), steps=1)
    assert (state.step_size, state.agreement, state.variance, state.excluded) == (1, 1, 0, 0)
    grads = jax.grad(lambda p: losses(p, examples(8, 0)).mean())(params_of())
    assert_close(params, jax.tree.map(lambda p, g: p - 0.1 * g, params_of(), grads))


def test_losses_of_more_axes():
    """[n, tokens]: every entry counts as an example."""

    def per_output(params, batch):
        return jnp.square(outputs(params, batch["x"]) - batch["y"])

    tx = optax_bilevel.coherent_steps(MOMENTUM, total_steps=500)
    params, state = run(tx, losses=per_output)

    def flat(params, batch):
        return per_output(params, batch).reshape(-1)

    assert_close((params, state), run(tx, losses=flat))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_proposal_that_is_not_finite_is_passed_on_but_not_remembered(bad):
    tx: Any = optax_bilevel.coherent_steps(optax.sgd(1.0))
    state = tx.init(jnp.zeros(2))
    _, state = tx.update(jnp.ones(2), state, alignment=-jnp.ones(2))
    before = state.direction
    updates, state = tx.update(jnp.array([1.0, bad]), state, alignment=-jnp.ones(2))
    assert not np.isfinite(updates[1])
    assert updates[0] == -1
    assert state.direction[1] == before[1]
    assert state.direction[0] < before[0] < 0
    assert state.step_size == 1


def test_python_floats():
    tx: Any = optax_bilevel.coherent_steps(optax.sgd(0.1), total_steps=100)

    def squares(params, batch):
        return jnp.square(params["slope"] * batch + params["start"])

    params = {"slope": 2.0, "start": 1.0}
    updates, state = {}, tx.init(params)
    for _ in range(2):
        grads = jax.grad(lambda p: squares(p, jnp.ones(3)).mean())(params)
        updates, state = tx.update(
            grads, state, params, losses_fn=lambda p: squares(p, jnp.ones(2))
        )
    assert updates["slope"].dtype == state.direction["slope"].dtype == jnp.float32
    np.testing.assert_allclose(updates["slope"], -0.6, rtol=1e-6)


def test_none_leaves():
    params, state = run(optax_bilevel.coherent_steps(MOMENTUM), {**params_of(), "frozen": None})
    assert params.pop("frozen") is None
    assert state.direction.pop("frozen") is None
    assert_close(params, run(optax_bilevel.coherent_steps(MOMENTUM))[0])


@pytest.mark.parametrize("empty", [{}, (), {"a": None}])
def test_empty_trees_pass_through(empty):
    tx: Any = optax_bilevel.coherent_steps(MOMENTUM)
    for extra in ({"losses_fn": lambda p: jnp.ones(3)}, {"alignment": jnp.ones(3)}):
        state = tx.init(empty)
        updates, after = tx.update(empty, state, empty, **extra)
        assert updates == empty
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        assert int(after.count) == 1


def test_alignment_in_place_of_losses():
    """From the pass that gives the logits as well."""
    tx = optax_bilevel.coherent_steps(MOMENTUM, total_steps=100)

    def with_outputs(params, batch):
        return losses(params, batch), outputs(params, batch["x"])

    @jax.jit
    def step(params, state, batch, held_out):
        grads = jax.grad(lambda p: losses(p, batch).mean())(params)
        alignment, predictions = optax_bilevel.example_alignment(
            with_outputs, params, held_out, state.direction, has_aux=True
        )
        updates, state = tx.update(grads, state, params, alignment=alignment)
        return (optax.apply_updates(params, updates), state), predictions

    carry = params_of(), tx.init(params_of())
    for i in range(4):
        carry, predictions = step(*carry, examples(8, i), examples(6, 100 + i))
        assert predictions.shape == (6, 3)
    assert_close(carry, run(tx))


# -------------------------------------------------------------------------------------- errors


def test_without_held_out_examples():
    tx = optax_bilevel.coherent_steps(MOMENTUM)
    with pytest.raises(ValueError, match="needs held-out examples at every update") as error:
        tx.update(jnp.ones(2), tx.init(jnp.zeros(2)), jnp.zeros(2))
    for line in ("tx = optax_bilevel.coherent_steps(", "losses_fn=lambda p: losses(p, held_out))"):
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "extra", "message"),
    [
        (
            (),
            {"losses_fn": lambda p: p, "alignment": np.ones(2)},
            "losses_fn or alignment, not both",
        ),
        ((), {"losses_fn": lambda p: p}, r"needs the parameters: tx.update\(grads, state, params"),
        ((0,), {"losses_fn": np.ones(2)}, "losses_fn must be a function of the parameters, got nd"),
        ((0,), {"losses_fn": jnp.sum}, r"losses are one scalar: .*\[n\], before their mean"),
        ((0,), {"losses_fn": lambda p: p > 0}, "losses have dtype bool: expected real floating"),
        ((0,), {"losses_fn": lambda p: (p, 1)}, "losses are no array but a tuple: expected the"),
        ((0,), {"losses_fn": lambda p: None}, "losses are no array but a NoneType: expected the"),
        ((), {"alignment": np.float32(1)}, r"alignment are one scalar: .* by example_alignment"),
        ((), {"alignment": np.ones(2, int)}, "alignment have dtype int.*: expected real floating"),
    ],
)
def test_what_is_no_account_of_held_out_examples(arguments, extra, message):
    tx = optax_bilevel.coherent_steps(MOMENTUM)
    arguments = [jnp.zeros(2) for _ in arguments]
    with pytest.raises(ValueError, match=message):
        tx.update(jnp.ones(2), tx.init(jnp.zeros(2)), *arguments, **extra)


def test_stacked_gradients():
    tx = optax_bilevel.coherent_steps(MOMENTUM)
    message = r"leaf \['w'\]: expected the parameter's shape \(2,\), got \(4, 2\).* of one batch"
    params = {"w": jnp.zeros(2)}
    with pytest.raises(ValueError, match=message):
        tx.update({"w": jnp.ones((4, 2))}, tx.init(params), params, alignment=jnp.ones(3))


@pytest.mark.parametrize("value", [0, -1, np.nan, np.inf, np.array(-100.0), jnp.float32(-100)])
def test_total_steps_out_of_range(value):
    with pytest.raises(ValueError, match="total_steps must be a positive finite number, got"):
        optax_bilevel.coherent_steps(MOMENTUM, total_steps=value)
