"""Steps as long as fresh mini-batches agree: against the formula, on devices, and at the edges."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import traffic
from optax_bilevel import coherent_steps, coherent_value_and_grad, mean_and_coherence
from tests.optax_bilevel.problems import (
    assert_close,
    assert_nothing,
    batches_of,
    loss,
    params_of,
    stack_of,
)

K = 8


def coherence_of(stack, direction):
    """Σc/Σ|c| of float64 rows."""
    cosines = stack @ direction / np.linalg.norm(stack, axis=1)
    return np.sum(cosines) / np.sum(np.abs(cosines))


def test_momentum_sgd_against_the_formula():
    rng = np.random.default_rng(0)
    stacks = rng.normal(size=(5, 4, 6)) + rng.normal(size=(5, 1, 6))
    stacks[3] = -3 * stacks[2]
    decay, coherence_decay, gain, margin, rate, momentum = 0.8, 0.6, 0.8, 0.5, 0.1, 0.9
    opt = optax.sgd(rate, momentum=momentum)
    tx = coherent_steps(opt, decay=decay, coherence_decay=coherence_decay, gain=gain, margin=margin)

    @jax.jit
    def step(stack, state, params):
        mean, s = mean_and_coherence(stack, state.direction)
        updates, state = tx.update(mean, state, params, coherence=s)
        return optax.apply_updates(params, updates), state

    params = jnp.zeros(6)
    state = tx.init(params)
    expected, direction, trace, average, variance = np.zeros(6), np.zeros(6), np.zeros(6), 1.0, 0.0
    averages = []
    for t, stack in enumerate(stacks):
        params, state = step(jnp.asarray(stack, jnp.float32), state, params)
        mean = stack.mean(axis=0)
        if t:
            s = coherence_of(stack, direction)
            before = average
            average = coherence_decay * average + (1 - coherence_decay) * s
            variance *= coherence_decay
            variance += (1 - coherence_decay) * (s - before) * (s - average)
        direction = decay * direction + (1 - decay) * mean
        trace = momentum * trace + mean
        deviation = np.sqrt((1 - coherence_decay) / (1 + coherence_decay) * variance)
        factor = np.clip(gain * (average - margin * deviation), 0, 1)
        expected = expected - factor * rate * trace
        np.testing.assert_allclose(params, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(state.coherence, average, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.variance, variance, rtol=1e-5, atol=1e-6)
        averages.append(average)
    assert step._cache_size() == 1
    assert int(state.count) == 5
    assert max(averages[1:]) > 0 > min(averages)  # both a part of a step, and none, were taken


def stack(dtype=jnp.float32, k=4):
    w, b = stack_of(3, [(3, 2), (5,)], k, dtype)
    return {"w": jnp.asarray(w), "b": jnp.asarray(b), "none": None}


def direction():
    return jax.tree.map(lambda x: x.astype(jnp.float32), first(stack()))


def first(tree):
    return jax.tree.map(lambda x: x[0], tree)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite_enters_neither(bad):
    grads = stack()
    broken = {**grads, "w": grads["w"].at[2, 0, 0].set(bad)}
    without = jax.tree.map(lambda x: jnp.delete(x, 2, axis=0), grads)
    function = jax.jit(mean_and_coherence)
    assert_close(function(broken, direction()), function(without, direction()))
    mean, s = function(jax.tree.map(lambda x: x * bad, grads), direction())
    assert_nothing((mean, s))


def test_nothing_to_agree_with():
    zeros = jax.tree.map(jnp.zeros_like, stack())
    assert_nothing(mean_and_coherence(zeros, direction()))
    mean, s = mean_and_coherence(stack(), first(zeros))
    assert_close(mean, jax.tree.map(lambda x: jnp.mean(x, axis=0), stack()))
    assert float(s) == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64])
def test_dtypes(dtype):
    grads = stack(dtype)
    tx = coherent_steps(optax.sgd(0.1))
    state = tx.init(first(grads))
    mean, s = mean_and_coherence(grads, state.direction)
    updates, after = tx.update(mean, state, coherence=s)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, mean)
    assert mean["w"].dtype == dtype
    assert after.direction["w"].dtype == (jnp.float32 if dtype == jnp.bfloat16 else dtype)


@pytest.mark.parametrize("check_vma", [True, False])
def test_one_mini_batch_per_device(check_vma):
    mesh = jax.make_mesh((K,), ("batch",), axis_types=(AxisType.Auto,))
    params, batches = params_of(), batches_of(K)
    batches["x"] = batches["x"].at[5, 0, 0].set(jnp.nan)
    toward = jax.tree.map(jnp.ones_like, params)

    def per_device(params, batch, toward):
        params = jax.lax.pcast(params, "batch", to="varying") if check_vma else params
        grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[0], batch))
        return mean_and_coherence(grads, toward, axis_name="batch")

    specs = {"in_specs": (P(), P("batch"), P()), "out_specs": P(), "check_vma": check_vma}
    mapped = jax.jit(jax.shard_map(per_device, mesh=mesh, **specs))
    grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batches)
    assert_close(mapped(params, batches, toward), mean_and_coherence(grads, toward))
    text = mapped.lower(params, batches, toward).compile().as_text()
    # One all-reduce of the gradient, as jax.lax.pmean has it, and of three scalars.
    numbers = sum(p.size for p in jax.tree.leaves(params)) + 3
    assert traffic.bytes_moved(text, K) == {"all-reduce": 2 * (K - 1) / K * 4 * numbers}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("spread", [1, 2, 4])
def test_a_mini_batch_over_several_devices(spread, check_vma, dtype):
    axes, k = ("batch", "example"), 8 // spread
    mesh = jax.make_mesh((k, spread), axes, axis_types=(AxisType.Auto,) * 2)
    keys = jax.random.split(jax.random.key(0))
    shapes = {"w": (8, 13, 11), "b": (8, 3)}
    grads = {
        name: jax.random.normal(key, shape).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    grads["w"] = grads["w"].at[5, 0, 0].set(jnp.nan)  # of one part of a mini-batch
    toward = jax.tree.map(lambda g: jnp.ones(g.shape[1:]), grads)

    def per_device(grads, toward):
        grads = jax.tree.map(lambda g: g[0], grads)
        return mean_and_coherence(grads, toward, axis_name="batch", example_axis="example")

    specs = {"in_specs": (P(axes), P()), "out_specs": P(), "check_vma": check_vma}
    mapped = jax.jit(jax.shard_map(per_device, mesh=mesh, **specs))
    stack = jax.tree.map(lambda g: g.reshape(k, spread, *g.shape[1:]).mean(1), grads)
    expected = mean_and_coherence(stack, toward)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for x, y in zip(jax.tree.leaves(mapped(grads, toward)), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(*np.asarray([x, y], np.float32), rtol=tolerance, atol=tolerance)
    if spread > 1 and dtype == jnp.float32:  # XLA widens bfloat16's on CPU
        text = mapped.lower(grads, toward).compile().as_text()
        moved = traffic.bytes_moved(text, 8)
        assert set(moved) == {"all-reduce", "all-to-all", "all-gather"}
        # The shards are padded: 146 numbers here to a multiple of 128 for each device.
        assert sum(moved.values()) <= 2 * 7 / 8 * 4 * (128 * spread + 16)


def test_an_example_axis_needs_the_axis_of_the_mini_batches():
    with pytest.raises(ValueError, match="example_axis needs axis_name"):
        mean_and_coherence({"w": jnp.ones((4, 2))}, {"w": jnp.ones(2)}, example_axis="example")


def loss_and_rows(params, batch):
    return loss(params, batch), batch["x"][:, 0]


@pytest.mark.parametrize(
    ("loop", "chunk_size"), [("scan", 1), ("unroll", 1), ("scan", 3), ("unroll", 3), (None, 20)]
)
def test_streaming_gives_what_the_stack_gives(loop, chunk_size):
    params, batches = params_of(), batches_of(K)
    batches["x"] = batches["x"].at[5, 0, 0].set(jnp.nan)
    toward = jax.tree.map(jnp.ones_like, params)
    grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batches)
    options = {"loop": loop, "chunk_size": chunk_size}
    step = jax.jit(coherent_value_and_grad(loss_and_rows, has_aux=True, **options))
    (losses, rows), *mean_and_s = step(params, batches, toward)
    assert_close(tuple(mean_and_s), mean_and_coherence(grads, toward))
    np.testing.assert_allclose(losses, jax.vmap(loss, (None, 0))(params, batches), rtol=1e-6)
    np.testing.assert_array_equal(rows, batches["x"][:, :, 0])


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_several_mini_batches_per_device(loop, check_vma):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    params, batches = params_of(), batches_of(3 * 4)
    batches["x"] = batches["x"].at[5, 0, 0].set(jnp.nan)
    toward = jax.tree.map(jnp.ones_like, params)
    step = coherent_value_and_grad(loss, loop=loop, axis_name="batch")
    specs = {"in_specs": (P(), P("batch"), P()), "out_specs": (P("batch"), P(), P())}
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, **specs, check_vma=check_vma))
    losses, *mean_and_s = mapped(params, batches, toward)
    expected_losses, *expected = coherent_value_and_grad(loss)(params, batches, toward)
    assert_close(mean_and_s, expected)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-6)
    text = mapped.lower(params, batches, toward).compile().as_text()
    numbers = sum(p.size for p in jax.tree.leaves(params)) + 3
    assert traffic.bytes_moved(text, 4) == {"all-reduce": 2 * 3 / 4 * 4 * numbers}


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_pmap():
    params, batches = params_of(), batches_of(2 * K)
    toward = jax.tree.map(jnp.ones_like, params)
    own = jax.tree.map(lambda x: x.reshape(K, 2, *x.shape[1:]), batches)
    step = coherent_value_and_grad(loss, axis_name="batch")
    losses, *mean_and_s = jax.pmap(step, "batch", in_axes=(None, 0, None))(params, own, toward)
    expected_losses, *expected = coherent_value_and_grad(loss)(params, batches, toward)
    for device in range(K):
        assert_close(jax.tree.map(lambda x, i=device: x[i], mean_and_s), expected)
    np.testing.assert_allclose(losses.reshape(-1), expected_losses, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.complex64])
def test_narrow_types_do_not_overflow_on_devices(dtype):
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    w, toward = jnp.zeros(3, dtype), jnp.ones(3, np.promote_types(dtype, np.float32))

    def linear(w, batch):  # whose gradient is the batch
        return jnp.real(jnp.vdot(batch.conj(), w)).astype(jnp.float32)

    batches = jnp.full((16, 3), 1e4, dtype).at[3].set(jnp.nan)
    step = coherent_value_and_grad(linear, axis_name="batch")
    specs = {"in_specs": (P(), P("batch"), P()), "out_specs": (P("batch"), P(), P())}
    _, mean, s = jax.jit(jax.shard_map(step, mesh=mesh, **specs))(w, batches, toward)
    assert mean.dtype == dtype
    np.testing.assert_allclose(np.asarray(mean, np.complex64), 1e4, rtol=1e-2)
    np.testing.assert_allclose(s, 1, rtol=1e-3)
    grads = jnp.full((8, 3), 3e4, dtype)

    def on_device(g):
        return mean_and_coherence(g[0], toward, axis_name="batch")

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": P("batch"), "out_specs": P(), "check_vma": False}
    mean, _ = jax.jit(jax.shard_map(on_device, mesh=mesh, **specs))(grads)
    np.testing.assert_allclose(np.asarray(mean, np.complex64), 3e4, rtol=1e-2)


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_streaming_on_an_explicit_mesh(loop):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    data = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)

    def loss(w, batch):
        return jnp.mean((batch @ w) ** 2)

    step = jax.jit(coherent_value_and_grad(loss, loop=loop))
    expected = step(jnp.ones(8), data, jnp.ones(8))
    with jax.set_mesh(mesh):
        w = jax.device_put(np.ones(8, np.float32), NamedSharding(mesh, P("y")))
        for spec in (P("y"), P()):
            direction = jax.device_put(np.ones(8, np.float32), NamedSharding(mesh, spec))
            _, mean, s = step(w, jax.device_put(data, NamedSharding(mesh, P())), direction)
            assert mean.sharding.is_equivalent_to(w.sharding, 1)
            assert_close((mean, s), expected[1:])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_state_on_a_mesh(axis_type):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    grads = stack_of(3, [(4, 8)], 4)[0]
    tx = coherent_steps(optax.sgd(0.1, momentum=0.9))

    @jax.jit
    def step(grads, state, params):
        mean, s = mean_and_coherence(grads, state.direction)
        return tx.update(mean, state, params, coherence=s)

    plain = tx.init(jnp.ones((4, 8)))
    for _ in range(3):
        expected, plain = step(grads, plain, jnp.ones((4, 8)))
    with jax.set_mesh(mesh):
        params = jax.device_put(np.ones((4, 8), np.float32), NamedSharding(mesh, P("x", "y")))
        placed = jax.device_put(grads, NamedSharding(mesh, P(None, "x", "y")))
        state = tx.init(params)
        types = jax.tree.map(jax.typeof, state)
        for _ in range(3):
            updates, state = step(placed, state, params)
            assert jax.tree.map(jax.typeof, state) == types
            assert state.direction.sharding.is_equivalent_to(params.sharding, 2)
    assert_close(updates, expected)
    np.testing.assert_allclose(state.coherence, plain.coherence, rtol=1e-6)


def test_first_steps_are_whole_whatever_the_coherence():
    tx = coherent_steps(optax.sgd(1.0), decay=0.5, coherence_decay=0.0, warmup_steps=3)
    state = tx.init(jnp.zeros(2))
    assert state.step_size == 1
    for factor in (1, 1, 1, 0.2, 0.2):
        updates, state = tx.update(jnp.ones(2), state, coherence=jnp.float32(0.05))
        np.testing.assert_allclose(updates, -factor * np.ones(2), rtol=1e-6)
        np.testing.assert_allclose(state.step_size, factor, rtol=1e-6)
    np.testing.assert_allclose(state.coherence, 0.05, rtol=1e-6)


def test_steps_are_whole_until_the_loss_has_fallen_once():
    tx = coherent_steps(
        optax.sgd(1.0), decay=0.5, coherence_decay=0.0, warmup_steps=1, warmup_loss=2.0
    )
    state = tx.init(jnp.zeros(2))
    # Averages 1 (in the warm-up), 2.5, 2.5, 2.25, 1.875, 2.9375.
    losses = (1.0, 4.0, math.nan, 2.0, 1.5, 4.0)
    for value, factor in zip(losses, (1, 1, 1, 1, 0.2, 0.2), strict=True):
        updates, state = tx.update(
            jnp.ones(2), state, coherence=jnp.float32(0.05), value=jnp.float32(value)
        )
        np.testing.assert_allclose(updates, -factor * np.ones(2), rtol=1e-6)
        np.testing.assert_allclose(state.step_size, factor, rtol=1e-6)
    np.testing.assert_allclose(state.loss, 2.9375)
    assert state.learning


def test_the_loss_goes_on_to_the_wrapped_optimizer():
    def by_loss(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda x: value * x, updates), state

    opt = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), by_loss)
    tx = coherent_steps(opt)
    state = tx.init(jnp.zeros(2))
    updates, state = tx.update(jnp.ones(2), state, coherence=jnp.float32(1), value=jnp.float32(3))
    np.testing.assert_array_equal(updates, [3, 3])
    assert not jnp.isfinite(state.loss)  # without warmup_loss nothing is averaged


def test_errors():
    for name, value in (("decay", -0.1), ("coherence_decay", 1.0)):
        with pytest.raises(ValueError, match=f"{name} must be at least 0 and below 1, got {value}"):
            coherent_steps(optax.sgd(0.1), **{name: value})
    with pytest.raises(ValueError, match="gain must be a positive finite number, got 0"):
        coherent_steps(optax.sgd(0.1), gain=0)
    with pytest.raises(ValueError, match="margin must be at least 0, got -1"):
        coherent_steps(optax.sgd(0.1), margin=-1)
    with pytest.raises(ValueError, match="warmup_steps must be at least 0, got -1"):
        coherent_steps(optax.sgd(0.1), warmup_steps=-1)
    with pytest.raises(ValueError, match="unknown loop 'while'; known: None, unroll, scan"):
        coherent_value_and_grad(loss, loop="while")
    with pytest.raises(ValueError, match="chunk_size must be a positive integer, got 0"):
        coherent_value_and_grad(loss, chunk_size=0)
    step = coherent_value_and_grad(lambda w, batch: jnp.sum(w["a"] * batch))
    w = {"a": jnp.zeros(2)}
    remedy = "take state.direction of coherent_steps"
    with pytest.raises(ValueError, match=rf"leaf \['a'\]: expected shape \(2,\) .* {remedy}"):
        step(w, jnp.ones((4, 2)), {"a": jnp.zeros(3)})
    with pytest.raises(ValueError, match=rf"direction and the gradients .* structure.*{remedy}"):
        step(w, jnp.ones((4, 2)), jnp.zeros(2))
    with pytest.raises(ValueError, match="batch leaf .* expected a leading axis of k"):
        step(w, jnp.ones(()), w)
    tx = coherent_steps(optax.sgd(0.1))
    state = tx.init({"w": jnp.zeros(2)})
    with pytest.raises(ValueError, match="needs the coherence of the step: mean, s ="):
        tx.update({"w": jnp.zeros(2)}, state)
    by_loss = coherent_steps(optax.sgd(0.1), warmup_loss=2.0)
    for losses in ({}, {"value": jnp.zeros(4)}):
        with pytest.raises(
            ValueError, match=r"the mean loss of the step, a scalar: .*value=jnp.mean"
        ):
            by_loss.update({"w": jnp.zeros(2)}, state, coherence=jnp.zeros(()), **losses)
    with pytest.raises(ValueError, match=r"leaf \['w'\]: expected shape \(k, 2\)"):
        mean_and_coherence({"w": jnp.zeros(2)}, state.direction)
    message = r"leaf \['w'\]: expected the parameter's shape \(2,\).* mean, s = mean_and_coherence"
    with pytest.raises(ValueError, match=message):
        tx.update({"w": jnp.zeros((3, 2))}, state, coherence=jnp.zeros(()))
