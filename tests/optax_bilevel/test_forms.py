"""One rule, four ways to feed it: the same mini-batches give the same update, whatever the way."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_bilevel
from tests.optax_bilevel.problems import (
    assert_close,
    assert_nothing,
    batches_of,
    distance,
    loss,
    outputs,
    params_of,
    slow,
    stacked_gradients,
)

K = 8  # one mini-batch per fake device


def mesh_of(shape, names):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


# -------------------------------------------------- the forms: (params, batches, options) -> both


def stacked(params, batches, loss_fn=loss, **options):
    grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, batches)
    k = jax.tree.leaves(batches)[0].shape[0]
    tx: Any = optax_bilevel.bilevel_reweight(**options, num_batches=k)
    update, state = tx.update(grads, tx.init(params), params)
    return update, state.weights


def weights_alone(params, batches, loss_fn=loss, **options):
    """`bilevel_weights`, and the update made from them by hand."""
    grads = jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, batches)
    weights = optax_bilevel.bilevel_weights(grads, **options)
    leaves, treedef = jax.tree.flatten(grads)
    if options.get("groups") == "leaf":
        rows = weights
    elif options.get("groups") is LABELS:
        rows = weights[np.array([0, 1, 0, 2])]
    else:
        rows = [weights] * len(leaves)
    update = [jnp.einsum("k,k...->...", w, g) for w, g in zip(rows, leaves, strict=True)]
    return treedef.unflatten(update), weights


def stream(params, batches, loss_fn=loss, **options):
    return optax_bilevel.bilevel_value_and_grad(loss_fn, **options)(params, batches)[1:]


def unrolled(params, batches, loss_fn=loss, **options):
    """What the library chooses on CPU for a network with convolutions."""

    def convolving(params, batch):
        x = jax.lax.conv_general_dilated(batch["x"][:, None], jnp.ones((1, 1, 1)), (1,), "SAME")
        return loss_fn(params, {**batch, "x": x[:, 0]})

    return stream(params, batches, convolving, **options)


def multi_steps(params, batches, loss_fn=loss, **options):
    k = jax.tree.leaves(batches)[0].shape[0]
    tx: Any = optax_bilevel.bilevel_multi_steps(optax.identity(), k, **options)

    def call(state, batch):
        update, state = tx.update(jax.grad(loss_fn)(params, batch), state, params)
        return state, update

    state, updates = jax.lax.scan(call, tx.init(params), batches)
    assert_nothing(jax.tree.map(lambda x: x[:-1], updates))
    return jax.tree.map(lambda x: x[-1], updates), state.weights


def collective(params, batches, loss_fn=loss, check_vma=True, **options):
    mesh = mesh_of((K,), ("batch",))

    def per_device(params, batch):
        if check_vma:
            params = jax.lax.pcast(params, "batch", to="varying")
        grads = jax.grad(loss_fn)(params, jax.tree.map(lambda x: x[0], batch))
        return optax_bilevel.bilevel_pmean_and_weights(grads, "batch", **options)

    specs = {"in_specs": (P(), P("batch")), "out_specs": P()}
    return jax.shard_map(per_device, mesh=mesh, **specs, check_vma=check_vma)(params, batches)


def mapped(params, batches, loss_fn=loss, transform=jax.vmap, **options):
    """pmap, or vmap with an axis name: the same code, the devices simulated."""

    def per_device(params, batch):
        grads = jax.grad(loss_fn)(params, batch)
        return optax_bilevel.bilevel_pmean_and_weights(grads, "batch", **options)

    mapping = transform(per_device, axis_name="batch", in_axes=(None, 0))
    if transform is jax.vmap:
        mapping = jax.jit(mapping)
    result = jax.tree.map(np.asarray, mapping(params, batches))
    for x in jax.tree.leaves(result):
        np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))  # same everywhere
    return jax.tree.map(lambda x: x[K - 1], result)


FORMS = {
    "stacked": stacked,
    "weights": weights_alone,
    "one by one": functools.partial(stream, microbatch_size=1),
    "three at a time": functools.partial(stream, microbatch_size=3),
    "unrolled": unrolled,
    "all at once": stream,
    "multi_steps": multi_steps,
    "shard_map": collective,
    "shard_map unchecked": functools.partial(collective, check_vma=False),
    "pmap": functools.partial(mapped, transform=jax.pmap),
    "vmap": mapped,
}
VARIANTS = ("unrolled", "all at once", "shard_map unchecked", "vmap")
NO_GRAM = ("one by one", "three at a time", "multi_steps", *VARIANTS[:2])
UNJITTED = ("multi_steps", "pmap", "vmap")  # they compile by themselves and assert on values

LABELS = {"gain": "one", "layer": {"bias": "two", "kernel": "one"}, "shift": "three"}
OPTIONS = {
    "defaults": {},
    "lam and mu": {"lam": 0.3, "mu": 2.0},
    "three validation": {"num_validation": 3},
    "unnormalised": {"normalize": False},
    "nonnegative": {"nonnegative": True, "num_validation": 2},
    "per leaf": {"groups": "leaf"},
    "per label": {"groups": LABELS, "num_validation": 2},
    # A singular system magnifies rounding (test_rule.py says how far): mu conditions it.
    "exact": {"solver": "exact", "num_validation": 2, "mu": 20.0},
    "exact per leaf": {"solver": "exact", "groups": "leaf", "mu": 20.0},
}


@functools.cache
def result(form, option):
    """(update, weights) of one form; compiled once, compared with all the others."""
    params, batches = params_of(), batches_of(K)
    function = functools.partial(FORMS[form], **OPTIONS[option])
    return (function if form in UNJITTED else jax.jit(function))(params, batches)


QUICK = ("per label", "exact")


@pytest.mark.parametrize("option", [o if o in QUICK else slow(o) for o in OPTIONS])
def test_every_pair_of_forms_agrees(option):
    exact = OPTIONS[option].get("solver") == "exact"
    left_out = NO_GRAM if exact else () if option == "three validation" else VARIANTS
    forms = [form for form in FORMS if form not in left_out]
    for a, b in itertools.combinations(forms, 2):
        assert_close(result(a, option), result(b, option))
        for of_a, of_b in zip(result(a, option), result(b, option), strict=True):
            assert distance(of_a, of_b) <= 1e-6, (a, b)


@pytest.mark.slow
def test_options_matter():
    """The comparisons above would hold as well if options were ignored everywhere."""
    grads = stacked_gradients(params_of(), batches_of(K))
    others = {"mu alone": {"mu": 20.0}, "mu per leaf": {"groups": "leaf", "mu": 20.0}}
    updates = []
    for options in (OPTIONS | others).values():
        tx: Any = optax_bilevel.bilevel_reweight(**options)
        updates.append(jax.jit(tx.update)(grads, tx.init(None))[0])
    for a, b in itertools.combinations(updates, 2):
        assert distance(a, b) > 1e-3


# ------------------------------------------------------------------ what only some of them can do


def test_multi_steps_over_several_windows():
    """Three steps of momentum SGD: parameters, momentum and health as with the stacked form."""
    k, params = 4, params_of()
    sgd = optax.sgd(0.1, momentum=0.9)
    one = optax.chain(optax_bilevel.bilevel_reweight(num_validation=2, num_batches=k), sgd)
    many: Any = optax_bilevel.bilevel_multi_steps(sgd, k, num_validation=2)

    @jax.jit
    def call(grads, state, params):
        updates, state = many.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    update_one = jax.jit(one.update)
    grad = jax.jit(jax.grad(loss))
    params_one = params_many = params
    state_one, state_many = one.init(params), many.init(params)
    for window in range(3):
        batches = batches_of(k, seed=window)
        grads = stacked_gradients(params_one, batches)
        updates, state_one = update_one(grads, state_one, params_one)
        before = params_one
        params_one = optax.apply_updates(params_one, updates)
        for i in range(k):
            assert_close(params_many, before, 1e-6)
            assert int(state_many.mini_step) == i
            batch = jax.tree.map(lambda x, i=i: x[i], batches)
            params_many, state_many = call(grad(before, batch), state_many, params_many)
        assert int(state_many.mini_step) == 0
        assert int(state_many.gradient_step) == window + 1
        assert_close(params_many, params_one, 1e-6)
        for name in ("cosine", "negative", "effective", "dropped", "weights"):
            expected = optax.tree.get(state_one, name)
            np.testing.assert_allclose(getattr(state_many, name), expected, rtol=2e-6, atol=1e-7)
    assert distance(params_one, params) > 0.1


@pytest.mark.parametrize(
    ("microbatch_size", "num_validation"),
    [(2, 1), (1, 4), slow(1, 1), slow(3, 4), slow(4, 1), slow(7, 2), slow(None, 2)],
)
def test_values_aux_and_order_of_the_stream(microbatch_size, num_validation):
    """Losses and aux come back in the mini-batches' order, of any structure and dtype."""

    def with_aux(params, batch):
        prediction = outputs(params, batch["x"])
        aux = {
            "prediction": prediction,
            "hits": jnp.sum(jnp.argmax(prediction, -1) == jnp.argmax(batch["y"], -1)),
            "nothing": None,
            "constant": 3,
        }
        return jnp.mean(jnp.square(prediction - batch["y"])), aux

    params, batches = params_of(), batches_of(6)
    options = {"num_validation": num_validation, "microbatch_size": microbatch_size}
    step = optax_bilevel.bilevel_value_and_grad(with_aux, has_aux=True, **options)
    (losses, aux), grads, weights = jax.jit(step)(params, batches)
    expected, expected_aux = jax.vmap(with_aux, in_axes=(None, 0))(params, batches)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    np.testing.assert_allclose(aux["prediction"], expected_aux["prediction"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(aux["hits"], expected_aux["hits"])
    assert aux["hits"].dtype == jnp.int32
    assert aux["nothing"] is None
    np.testing.assert_array_equal(aux["constant"], [3] * 6)
    assert_close((grads, weights), stacked(params, batches, num_validation=num_validation))


def test_aux_without_jit():
    step = optax_bilevel.bilevel_value_and_grad(
        lambda w, x: (jnp.sum(w * x), {"constant": 3}), has_aux=True
    )
    (losses, aux), _, _ = step(jnp.ones(2), jnp.ones((3, 2)))
    np.testing.assert_array_equal(losses, [2, 2, 2])
    np.testing.assert_array_equal(aux["constant"], [3, 3, 3])


@pytest.mark.parametrize(
    ("make_key", "form"),
    [
        (jax.random.key, functools.partial(stream, microbatch_size=2)),
        (jax.random.key, unrolled),
        (jax.random.PRNGKey, functools.partial(stream, microbatch_size=1)),
    ],
)
def test_random_keys_are_part_of_the_batches(make_key, form):
    """Every mini-batch draws its own dropout mask, the same one in every form."""
    params = params_of()
    batches = {**batches_of(4), "key": jax.random.split(make_key(5), 4)}

    def noisy(params, batch):
        mask = jax.random.bernoulli(batch["key"], 0.5, batch["x"].shape)
        return loss(params, {"x": jnp.where(mask, batch["x"], 0), "y": batch["y"]})

    expected = stacked(params, batches, noisy)
    assert_close(jax.jit(functools.partial(form, loss_fn=noisy))(params, batches), expected)
    swapped = {**batches, "key": batches["key"][::-1]}
    assert distance(stacked(params, swapped, noisy)[0], expected[0]) > 1e-2


@pytest.mark.parametrize("microbatch_size", [1, 2, None])
def test_keys_may_come_back_as_aux(microbatch_size):
    def loss_fn(w, key):
        return jnp.sum(w * jax.random.normal(key, (2,))), jax.random.fold_in(key, 1)

    keys = jax.random.split(jax.random.key(0), 4)
    step = optax_bilevel.bilevel_value_and_grad(
        loss_fn, has_aux=True, microbatch_size=microbatch_size
    )
    (_, folded), _, _ = jax.jit(step)(jnp.ones(2), keys)
    expected = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    np.testing.assert_array_equal(jax.random.key_data(folded), jax.random.key_data(expected))


@pytest.mark.parametrize("form", ["one by one", "unrolled", "multi_steps", "shard_map", "pmap"])
@pytest.mark.parametrize("option", [slow("defaults"), "per leaf"])
def test_forms_agree_on_mixed_dtypes(form, option):
    params, batches = params_of(), batches_of(K)
    params["layer"]["kernel"] = params["layer"]["kernel"].astype(jnp.bfloat16)
    options = OPTIONS[option]
    expected, expected_weights = jax.jit(functools.partial(stacked, **options))(params, batches)
    function = functools.partial(FORMS[form], **options)
    update, weights = (function if form in UNJITTED else jax.jit(function))(params, batches)
    assert distance(weights, expected_weights) <= 1e-6
    kernel, expected_kernel = update["layer"].pop("kernel"), expected["layer"].pop("kernel")
    assert kernel.dtype == expected_kernel.dtype == jnp.bfloat16
    # One rounding to bfloat16 may fall to either side.
    assert distance(kernel, expected_kernel) <= 2**-8
    assert_close(update, expected)


# --------------------------------------------------------------------- where a stack may come from


@pytest.mark.parametrize("how", ["vmap", "lax.map", "pmap"])
def test_stacks_of_any_make(how):
    params, batches = params_of(), batches_of(K)
    grad = jax.grad(loss)
    if how == "vmap":
        grads = jax.jit(jax.vmap(grad, in_axes=(None, 0)))(params, batches)
    elif how == "lax.map":
        grads = jax.jit(lambda p, b: jax.lax.map(lambda b: grad(p, b), b))(params, batches)
    else:
        grads = jax.pmap(grad, in_axes=(None, 0))(params, batches)
        assert len(jax.tree.leaves(grads)[0].sharding.device_set) == K
    tx = optax_bilevel.bilevel_reweight()
    update, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert_close(update, result("one by one", "defaults")[0])


# --------------------------------------------------------------- the collective form on many axes


@pytest.mark.parametrize(
    ("shape", "axis", "example_axis", "check_vma"),
    [
        ((4, 2), "k", "e", True),
        slow((2, 4), "k", "e", False),
        ((2, 2, 2), ("k", "k2"), "e", True),
        slow((2, 2, 2), "k", ("k2", "e"), True),
        slow((2, 4), ("k", "e"), None, True),
    ],
)
def test_second_axis(shape, axis, example_axis, check_vma):
    """A mini-batch spread over devices counts as one: its gradients are averaged."""
    names = ("k", "e") if len(shape) == 2 else ("k", "k2", "e")
    mesh = mesh_of(shape, names)
    sizes: dict[str, int] = dict(zip(names, shape, strict=True))
    k = np.prod([sizes[name] for name in ((axis,) if isinstance(axis, str) else axis)])
    params, batches = params_of(), batches_of(int(k), b=8)

    def per_device(params, batch):
        if check_vma:
            params = jax.lax.pcast(params, names, to="varying")
        grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[0], batch))
        return optax_bilevel.bilevel_pmean_and_weights(
            grads, axis, mu=0.1, example_axis=example_axis
        )

    specs = {"in_specs": (P(), P(axis, example_axis)), "out_specs": P(), "check_vma": check_vma}
    update, weights = jax.jit(jax.shard_map(per_device, mesh=mesh, **specs))(params, batches)
    expected, expected_weights = stacked(params, batches, mu=0.1)
    assert_close(update, expected)
    assert distance(weights, expected_weights) <= 1e-6


def test_streaming_on_every_device():
    """Data-parallel streaming: every device has a part of each of the k mini-batches."""
    mesh = mesh_of((8,), ("examples",))
    params, batches = params_of(), batches_of(4, b=8)

    def mean_loss(params, batch):
        return jax.lax.pmean(loss(params, batch), "examples")

    def per_device(params, batches):
        return stream(params, batches, mean_loss, microbatch_size=1)

    specs = {"in_specs": (P(), P(None, "examples")), "out_specs": P()}
    actual = jax.jit(jax.shard_map(per_device, mesh=mesh, **specs))(params, batches)
    assert_close(actual, stacked(params, batches))


def test_streaming_complex_parameters():
    """A real loss of complex parameters, as jax.grad has it."""
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(6, 4, 3)) + 1j * rng.normal(size=(6, 4, 3)) for _ in range(2))
    batches = (jnp.asarray(x, jnp.complex64), jnp.asarray(y[..., 0], jnp.complex64))
    weights = jnp.asarray([1 + 1j, -1j, 0.5], jnp.complex64)

    def complex_loss(w, batch):
        off = batch[0] @ w - batch[1]
        return jnp.mean(jnp.real(off * jnp.conj(off)))

    expected = stacked(weights, batches, complex_loss)
    (update, omega), (of_stack, omega_of_stack) = stream(weights, batches, complex_loss), expected
    assert update.dtype == jnp.complex64
    np.testing.assert_allclose(update, of_stack, rtol=2e-6)
    np.testing.assert_allclose(omega, omega_of_stack, atol=1e-6)
