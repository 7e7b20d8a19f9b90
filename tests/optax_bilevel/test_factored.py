"""Gradients of layers that are never formed: the same updates from their factors."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_bilevel
from benchmarks import timing
from optax_bilevel import _factored
from tests.optax_bilevel.problems import assert_close, distance

K, B = 6, 3


def random(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def dense(params, x):
    return jax.nn.relu(x @ params["a"] + params["bias"][None]) @ params["b"]


def transposed(params, x):
    """Kernels of another order of axes, as some libraries have them."""
    hidden = jnp.einsum("bi,oi->bo", x, params["a"].T)
    return jax.nn.relu(hidden + params["bias"][None]) @ params["b"]


def heads(params, x):
    """Kernels of three axes, and more than one axis of examples."""
    a = params["a"].reshape(16, 6, 4)
    hidden = jnp.einsum("bti,ihd->bthd", x.reshape(-1, 1, 16), a).reshape(-1, 24)
    return jax.nn.relu(hidden + params["bias"][None]) @ params["b"]


def narrow(params, x):
    """Computes in bfloat16; parameters and gradients are float32."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    return dense(half, x.astype(jnp.bfloat16)).astype(jnp.float32)


def twice(params, x):
    hidden = jax.nn.relu(x @ params["a"] + params["bias"][None])
    return (jax.nn.relu(hidden @ params["a"].T) @ params["a"]) @ params["b"]


def unused(params, x):
    """The bias has a gradient of zeros that nothing makes."""
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def jitted(params, x):
    return jax.jit(dense)(params, x)


NETWORKS = {f.__name__: f for f in (dense, transposed, heads, narrow, twice, unused, jitted)}


def loss_of(network):
    def loss(params, batch):
        return jnp.mean(jnp.square(network(params, batch["x"]) - batch["y"]))

    return loss


def problem(k=K, b=B):
    params = {"a": random(0, 16, 24), "bias": random(1, 24), "b": 0.2 * random(2, 24, 12)}
    shared = random(3, 1, 1, 12)
    return params, {"x": random(4, k, b, 16), "y": random(5, k, b, 12) + shared}


def by_stack(loss, params, batches, **options):
    grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batches)
    tx: Any = optax_bilevel.bilevel_reweight(**options, num_batches=len(batches["x"]))
    grads, state = tx.update(grads, tx.init(params), params)
    return grads, state.weights


def by_factors(loss, params, batches, **options):
    step = optax_bilevel.bilevel_value_and_grad(loss, **options)
    return step(params, batches)[1:]


def kinds(network):
    """Which gradients of a network's loss are kept as factors."""
    params, batches = problem()
    stacked = jax.vmap(jax.grad(loss_of(network)), in_axes=(None, 0))
    found = []
    jax.eval_shape(lambda *args: found.append(_factored.evaluate(stacked, *args)), params, batches)
    return [isinstance(found[0][name], _factored.Factored) for name in ("a", "b", "bias")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, [True, True, False]) for name in ("dense", "transposed", "narrow", "unused")),
        ("heads", [False, True, False]),  # a is reshaped
        ("twice", [False, True, False]),
        ("jitted", [False, False, False]),
    ],
)
def test_which_gradients_are_kept_as_factors(name, expected):
    assert kinds(NETWORKS[name]) == expected


@pytest.mark.parametrize(
    ("subscripts", "shape"),
    [
        ("bti,ihd->bhtd", (16, 6, 4)),
        ("bti,hdi->bhtd", (6, 4, 16)),
        ("bxyi,xyih->bh", (4, 2, 16, 6)),
    ],
)
def test_kernels_of_several_axes_are_factored(subscripts, shape):
    def gradient(kernel, x):
        return jax.grad(lambda w: jnp.sum(jnp.einsum(subscripts, x, w) ** 2))(kernel)

    kernel = random(0, *shape)
    x = random(1, K, 2, *((4, 2) if len(shape) == 4 else (1,)), 16)
    whole = jax.vmap(gradient, in_axes=(None, 0))(kernel, x)
    factored = _factored.evaluate(jax.vmap(gradient, in_axes=(None, 0)), kernel, x)
    assert isinstance(factored, _factored.Factored)
    assert factored.shape[0] == K
    omega = random(2, K)
    assert_close(factored.weighted_sum(omega), jnp.tensordot(omega, whole, 1))
    rows, v = whole.reshape(K, -1), random(3, *shape)
    assert_close(factored.square_sums(jnp.float32), jnp.sum(rows**2, axis=1))
    assert_close(factored.dots_with(v, jnp.float32), rows @ v.reshape(-1), 2e-6)
    first = rows[:2].sum(axis=0)
    assert_close(factored.dots_with_first(2, jnp.float32), rows @ first, 2e-6)


OPTIONS = {
    "defaults": {},
    "lam and mu": {"lam": 0.3, "mu": 2.0},
    "two validation": {"num_validation": 2},
    "unnormalised": {"normalize": False},
    "nonnegative": {"nonnegative": True},
    "per leaf": {"groups": "leaf"},
    "per label": {"groups": {"a": 0, "b": 1, "bias": 0}, "num_validation": 2},
}


@pytest.mark.parametrize("microbatch_size", [None, 2, K])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(options, microbatch_size):
    params, batches = problem()
    loss = loss_of(dense)
    expected = by_stack(loss, params, batches, **options)
    result = jax.jit(
        functools.partial(by_factors, loss, microbatch_size=microbatch_size, **options)
    )(params, batches)
    assert_close(result, expected, 2e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network(name):
    params, batches = problem()
    loss = loss_of(NETWORKS[name])
    expected = by_stack(loss, params, batches)
    assert_close(by_factors(loss, params, batches), expected, 1e-2 if name == "narrow" else 2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_gradients_do_not_overflow(dtype):
    params, batches = problem()
    params, batches = jax.tree.map(lambda x: x.astype(dtype), (params, batches))
    loss = loss_of(dense)

    def large(params, batch):
        return 1e3 * loss(params, batch)

    grads, weights = by_factors(large, params, batches)
    expected, expected_weights = by_stack(large, params, batches)
    assert all(x.dtype == dtype for x in jax.tree.leaves(grads))
    assert distance(weights, expected_weights) < 3e-2
    assert distance(grads, expected) < 3e-2


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 4])
def test_what_is_not_finite_is_left_out(place, value):
    params, batches = problem()
    loss = loss_of(dense)
    spoilt = {**batches, "x": batches["x"].at[place, 1, 2].set(value)}
    result = by_factors(loss, params, spoilt)
    expected = by_stack(loss, params, spoilt)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result))
    if place == 0:  # the validation mini-batch
        assert not any(np.any(x) for x in jax.tree.leaves(result[0]))
    else:
        without = jax.tree.map(lambda x: jnp.delete(x, place, axis=0), batches)
        assert_close(result[0], by_factors(loss, params, without)[0], 2e-6)
    assert_close(result, expected, 2e-6)


def spread_over_two_devices(loss, params, batches, check_vma):
    """The gradients and weights, with half of the mini-batches on each device."""
    mesh = jax.make_mesh((2,), ("batch",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    spread = optax_bilevel.bilevel_value_and_grad(loss, axis_name="batch")

    def on_device(params, validation, own):
        joined = jax.tree.map(lambda v, x: jnp.concatenate([v, x]), validation, own)
        return spread(params, joined)

    step = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P(), P(), P("batch")),
        out_specs=(P("batch"), P(), P()),
        check_vma=check_vma,
    )
    validation = jax.tree.map(lambda x: x[:1], batches)
    return jax.jit(step)(params, validation, batches)[1:]


@pytest.mark.parametrize("check_vma", [True, False])
def test_spread_over_devices(check_vma):
    params, batches = problem(k=8)
    result = spread_over_two_devices(loss_of(dense), params, batches, check_vma)
    assert_close(result, by_stack(loss_of(dense), params, batches), 2e-6)


@pytest.mark.slow
def test_an_explicit_mesh():
    params, batches = problem()
    loss = loss_of(dense)
    expected = by_stack(loss, params, batches)
    mesh = jax.make_mesh(
        (2,), ("batch",), devices=jax.devices()[:2], axis_types=(AxisType.Explicit,)
    )
    with jax.set_mesh(mesh):
        placed = jax.device_put((params, batches), P())
        for microbatch_size in (None, 2, K):
            assert_close(by_factors(loss, *placed, microbatch_size=microbatch_size), expected, 2e-6)


def convolutional(params, batch):
    x = jax.lax.conv_general_dilated(
        batch["x"].reshape(-1, 4, 4, 1),
        params["filter"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jax.nn.relu(x).reshape(-1, 128)
    return jnp.mean(jnp.square(jnp.tanh(x @ params["dense"]) - batch["y"]))


@pytest.mark.parametrize(("num_validation", "microbatch_size"), [(1, None), (2, 2), (2, K)])
def test_convolutions_before_large_dense_layers(num_validation, microbatch_size):
    params = {"filter": random(0, 3, 3, 1, 8), "dense": 0.1 * random(1, 128, 12)}
    batches = problem()[1]
    options = {"num_validation": num_validation}
    form = functools.partial(by_factors, convolutional, microbatch_size=microbatch_size, **options)
    result = jax.jit(form)(params, batches)
    assert_close(result, by_stack(convolutional, params, batches, **options), 2e-6)


@pytest.mark.slow
def test_values_and_aux_in_order():
    params, batches = problem()
    batches["key"] = jax.random.split(jax.random.key(0), K)

    def loss(params, batch):
        noise = jax.random.normal(batch["key"], batch["x"].shape)
        value = loss_of(dense)(params, {**batch, "x": batch["x"] + noise})
        return value, (batch["key"], value**2)

    def values(microbatch_size):
        step = optax_bilevel.bilevel_value_and_grad(
            loss, has_aux=True, microbatch_size=microbatch_size
        )
        losses, (keys, squares) = step(params, batches)[0]
        return losses, jax.random.key_data(keys), squares

    assert_close(values(None)[::2], values(1)[::2])
    np.testing.assert_array_equal(values(None)[1], values(1)[1])


def temporary_bytes(step, params, batches):
    compiled = jax.jit(step).lower(params, batches).compile()
    return timing.temporary_bytes(compiled)


@pytest.mark.parametrize("k", [4, 32])
@pytest.mark.parametrize("b", [2, 8, 32])
def test_takes_at_most_a_gradient_more_memory_than_one_by_one(b, k):
    shapes = {"a": (256, 512), "bias": (512,), "b": (512, 128)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    batches = {
        "x": jax.ShapeDtypeStruct((k, b, 256), jnp.float32),
        "y": jax.ShapeDtypeStruct((k, b, 128), jnp.float32),
    }
    fitting, one_by_one = (
        temporary_bytes(functools.partial(by_factors, loss_of(dense), microbatch_size=size), *args)
        for size in (None, 1)
        for args in [(params, batches)]
    )
    gradient = 4 * sum(x.size for x in params.values())  # which XLA's loop copies, or does not
    assert fitting <= 1.3 * one_by_one + gradient


def test_trains():
    params, batches = problem()
    loss = loss_of(dense)
    step = optax_bilevel.bilevel_value_and_grad(loss)
    tx = optax.sgd(0.01, momentum=0.9)

    @jax.jit
    def train(params, state):
        losses, grads, _ = step(params, batches)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, losses.mean()

    state, losses = tx.init(params), []
    for _ in range(30):
        params, state, value = train(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
