"""Validation by the past: a float64 oracle, the four forms over several steps, and the edges."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_bilevel
from optax_bilevel import Past, init_past
from tests.optax_bilevel import oracle
from tests.optax_bilevel.problems import (
    assert_close,
    assert_nothing,
    batches_of,
    loss,
    params_of,
    slow,
    stack_of,
)

K = 8  # one mini-batch per fake device
STEPS = 4


def reweight(**options):
    tx = optax_bilevel.bilevel_reweight(validation="past", **options)
    return tx._replace(update=jax.jit(tx.update))


# ------------------------------------------------------------------------ against the equations

SHAPES = [(5, 3), (4,), ()]
OPTIONS = {
    "defaults": {},
    "decay 0": {"decay": 0.0},
    "decay 0.99, mu 1": {"decay": 0.99, "mu": 1.0},
    "no guard": {"guard": "none"},
    "unnormalised": {"normalize": False, "decay": 0.5},
    "nonnegative": {"nonnegative": True},
    "per label": {"groups": ["a", "b", "a"]},
    "exact": {"solver": "exact", "mu": 20.0},
}


@functools.cache
def stacks():
    """Six steps of five gradients; the fourth takes back the three before: the guard's case."""
    all_leaves = [stack_of(seed, SHAPES, 5) for seed in range(6)]
    all_leaves[3] = [-sum(x) for x in zip(*all_leaves[:3], strict=True)]
    return all_leaves


@pytest.mark.parametrize("option", OPTIONS)
def test_rule_of_the_past(option):
    options = {"decay": 0.9, **OPTIONS[option]}
    tx = reweight(**OPTIONS[option], num_batches=5)
    state = tx.init([jnp.zeros(shape) for shape in SHAPES])
    update = jax.jit(tx.update)
    ids = [0, 1, 0] if "groups" in options else [0, 0, 0]
    decay, expected_options = options["decay"], {**options, "groups": ids}
    del expected_options["decay"]
    means, guarded = [], []
    for step, leaves in enumerate(stacks()):
        updates, state = update(leaves, state)
        weights = np.reshape(state.weights, (-1, 5))
        if step == 0:
            np.testing.assert_allclose(weights, np.full_like(weights, 0.2), rtol=1e-6)
            for u, x in zip(updates, leaves, strict=True):
                np.testing.assert_allclose(u, np.mean(x, axis=0), rtol=1e-5, atol=1e-6)
            assert float(state.cosine) == 0
        else:
            past = oracle.average_of(means, decay)
            answer = oracle.reweight(leaves, past=past, **expected_options)
            for group in range(max(ids) + 1):
                off = np.abs(weights[group] - answer.weights[group]).sum()
                assert off <= 2e-6 * answer.weights_bound[group]
            for u, expected, group in zip(updates, answer.update, ids, strict=True):
                assert np.linalg.norm(u - expected) <= 2e-6 * answer.update_bound[group]
            if not answer.weights[0].any():
                guarded.append(step)
        means.append([oracle.widen(x).mean(axis=0) for x in leaves])
        average = oracle.average_of(means, decay)
        for x, expected in zip(state.past.average, average, strict=True):
            np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.past.weight, 1 - decay**6, rtol=1e-5)
    assert (3 in guarded) == (option != "no guard")


# ----------------------- the forms: (params, batches, state) -> (update, ω, average), new state


def stacked(**options):
    tx = reweight(**options, num_batches=K)

    def step(params, batches, state):
        state = tx.init(params) if state is None else state
        grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batches)
        update, state = tx.update(grads, state, params)
        return (update, state.weights, state.past.average), state

    return step


def stream(loop="scan", chunk_size=1, **options):
    function = optax_bilevel.bilevel_value_and_grad(
        loss, validation="past", loop=loop, chunk_size=chunk_size, **options
    )

    def step(params, batches, past):
        past = init_past(params) if past is None else past
        _, update, weights, past = function(params, batches, past)
        return (update, weights, past.average), past

    return step


def multi_steps(**options):
    tx = optax_bilevel.bilevel_multi_steps(optax.identity(), K, validation="past", **options)

    def step(params, batches, state):
        def call(state, batch):
            update, state = tx.update(jax.grad(loss)(params, batch), state, params)
            return state, update

        state = tx.init(params) if state is None else state
        state, updates = jax.lax.scan(call, state, batches)
        update = jax.tree.map(lambda x: x[-1], updates)
        return (update, state.weights, state.past.average), state

    return step


def unpadded(past, params):
    return jax.tree.map(lambda a, p: a.reshape(-1)[: p.size].reshape(p.shape), past.average, params)


def collective(shape=(K,), check_vma=True, **options):
    names = ("batch", "example")[: len(shape)]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
    example_axis = "example" if len(shape) == 2 else None
    rows = Past(P(names), P())

    def per_device(params, batch, past):
        params = jax.lax.pcast(params, names, to="varying") if check_vma else params
        grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[0], batch))
        return optax_bilevel.bilevel_pmean(
            grads,
            "batch",
            validation="past",
            past=past,
            example_axis=example_axis,
            return_weights=True,
            **options,
        )

    mapped = jax.shard_map(
        per_device,
        mesh=mesh,
        in_specs=(P(), P(*names), rows),
        out_specs=(P(), P(), rows),
        check_vma=check_vma,
    )

    def step(params, batches, past):
        past = init_past(params, num_devices=mesh.size) if past is None else past
        update, weights, past = mapped(params, batches, past)
        return (update, weights, unpadded(past, params)), past

    return step


def mapped(transform, **options):
    def per_device(params, batch, past):
        grads = jax.grad(loss)(params, batch)
        return optax_bilevel.bilevel_pmean(
            grads, "batch", validation="past", past=past, return_weights=True, **options
        )

    function = transform(
        per_device,
        axis_name="batch",
        in_axes=(None, 0, Past(0, None)),
        out_axes=(None, None, Past(0, None)),
    )

    def step(params, batches, past):
        past = init_past(params, num_devices=K) if past is None else past
        update, weights, past = function(params, batches, past)
        return (update, weights, unpadded(past, params)), past

    return step


def spread(**options):
    """Two mini-batches on each of four devices: streamed there, exchanged once."""
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    function = optax_bilevel.bilevel_value_and_grad(
        loss, validation="past", axis_name="batch", **options
    )
    sharded = jax.shard_map(
        lambda *x: function(*x)[1:],
        mesh=mesh,
        in_specs=(P(), P("batch"), P()),
        out_specs=(P(), P(), P()),
    )

    def step(params, batches, past):
        past = init_past(params) if past is None else past
        update, weights, past = sharded(params, batches, past)
        return (update, weights, past.average), past

    return step


FORMS = {
    "stacked": stacked,
    "scan": stream,
    "multi_steps": multi_steps,
    "vmap": functools.partial(mapped, jax.vmap),
    "shard_map": collective,
    "spread": spread,
    "scan by 2": functools.partial(stream, chunk_size=2),
    "unroll by 3": functools.partial(stream, loop="unroll", chunk_size=3),
    "unroll": functools.partial(stream, loop="unroll"),
    "unchecked": functools.partial(collective, check_vma=False),
    "pmap": functools.partial(mapped, jax.pmap),
}
QUICK = list(FORMS)[:4]
LABELS = {"gain": "one", "layer": {"bias": "two", "kernel": "one"}, "shift": "three"}
FORM_OPTIONS = {
    "defaults": {"num_validation": 1},
    "per label": {"groups": LABELS, "decay": 0.5, "guard": "none"},
    "unnormalised": {"normalize": False, "mu": 0.5},
}


def train(form, options, *, k=K, b=4):
    """Descends by each step's update; a NaN in one mini-batch of the third step."""
    step = form(**options)
    if form is not FORMS["pmap"]:
        step = jax.jit(step)
    params, state, results = params_of(), None, []
    for seed in range(STEPS):
        batches = batches_of(k, b, seed=seed)
        if seed == 2:
            batches["x"] = batches["x"].at[k // 2, 0, 0].set(jnp.nan)
        result, state = step(params, batches, state)
        result = jax.tree.map(np.asarray, result)
        params = jax.tree.map(lambda p, u: p - np.float32(0.3) * u, params, result[0])
        results.append(result)
    return results


@functools.cache
def results(form, option):
    return train(FORMS[form], FORM_OPTIONS[option])


@pytest.mark.parametrize(
    ("forms", "option"),
    [
        (QUICK, "defaults"),
        slow(list(FORMS), "defaults"),
        slow(list(FORMS)[:6], "per label"),
        slow(list(FORMS)[:6], "unnormalised"),
    ],
)
def test_every_pair_of_forms_agrees(forms, option):
    for a, b in itertools.combinations(forms, 2):
        for of_a, of_b in zip(results(a, option), results(b, option), strict=True):
            for x, y in zip(of_a, of_b, strict=True):
                assert_close(x, y, 3e-6)


def test_steps_of_the_forms_are_worth_comparing():
    all_weights = [weights for _, weights, _ in results("stacked", "defaults")]
    np.testing.assert_allclose(all_weights[0], np.full(K, 1 / K), rtol=1e-6)
    assert all_weights[2][K // 2] == 0  # the NaN
    for weights in all_weights[1:]:
        assert np.ptp(weights) > 0.05
        np.testing.assert_allclose(np.abs(weights).sum(), 1, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 2), (2, 4)])
def test_mini_batches_spread_over_devices(shape):
    options = {"decay": 0.5}
    actual = train(functools.partial(collective, shape), options, k=shape[0], b=8)
    expected = train(stream, options, k=shape[0], b=8)
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y, 3e-6)


@pytest.mark.slow
def test_eq_8_collective():
    options = {"solver": "exact", "mu": 20.0}
    for x, y in zip(train(collective, options), train(stacked, options), strict=True):
        assert_close(x, y, 1e-5)


# ----------------------------------------------------------------------------------------- edges


def after_steps(tx, leaves, count=2):
    state = tx.init(jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), leaves))
    for seed in range(count):
        _, state = tx.update(jax.tree.map(lambda x, s=seed: x * (1 + s), leaves), state)
    return state


def gradients(k=4, dtype=jnp.float32):
    w, b = stack_of(7, [(3, 2), (5,)], k, dtype)
    return {"w": jnp.asarray(w), "b": jnp.asarray(b), "none": None}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("steps", [0, 2])
def test_not_finite_enters_neither_update_nor_average(bad, steps):
    grads = gradients(5)
    broken = {**grads, "b": grads["b"].at[1, 0].set(bad)}
    without = jax.tree.map(lambda x: jnp.delete(x, 1, axis=0), grads)
    tx = reweight()
    state = after_steps(tx, grads, steps)
    update, after = tx.update(broken, state)
    expected, expected_after = tx.update(without, state)
    assert_close(update, expected)
    assert_close(after.past, expected_after.past)
    assert int(after.dropped) == 1


@pytest.mark.parametrize("steps", [0, 2])
def test_nothing_finite_leaves_the_past_alone(steps):
    tx = reweight()
    state = after_steps(tx, gradients(), steps)
    update, after = tx.update(jax.tree.map(lambda x: x * jnp.nan, gradients()), state)
    assert_nothing(update)
    jax.tree.map(np.testing.assert_array_equal, after.past, state.past)
    assert int(after.dropped) == 4
    # and it goes on as if that step had not been
    assert_close(tx.update(gradients(), after)[0], tx.update(gradients(), state)[0], 0)


@pytest.mark.parametrize("steps", [0, 2])
def test_zero_gradients(steps):
    nothing = jax.tree.map(jnp.zeros_like, gradients())
    tx = reweight()
    update, state = tx.update(nothing, after_steps(tx, gradients(), steps))
    assert_nothing(update)
    update, state = tx.update(nothing, after_steps(tx, nothing))  # the past is zero as well
    assert_nothing(update)
    assert_nothing(state.past.average)
    assert float(state.effective) == 0


def test_one_mini_batch_a_step():
    """With k = 1 the weight is a sign, and the guard leaves out what points against the past."""
    past, agrees, disagrees = (jnp.array([[x, 1.0]]) for x in (1.0, 3.0, -2.0))
    for guard, expected in (("zero", [0.0, 0.0]), ("none", [2.0, -1.0])):
        tx = reweight(guard=guard, num_batches=1)
        update, state = tx.update(past, tx.init(jnp.zeros(2)))
        np.testing.assert_allclose(update, [1, 1])
        np.testing.assert_allclose(tx.update(agrees, state)[0], [3, 1])
        update, _ = tx.update(disagrees, state)
        np.testing.assert_allclose(update, expected)
        many = optax_bilevel.bilevel_multi_steps(optax.sgd(1.0), 1, validation="past", guard=guard)
        state = many.init(jnp.zeros(2))
        for grad, descent in ((past, [1, 1]), (agrees, [3, 1])):
            update, state = many.update(grad[0], state)
            np.testing.assert_allclose(update, -np.array(descent))


def test_guarded_step_only_moves_the_average():
    tx = reweight(num_batches=4, decay=0.5)
    state = after_steps(tx, gradients())
    update, after = tx.update(jax.tree.map(jnp.negative, gradients()), state)
    assert_nothing(update)
    assert_nothing(after.weights)
    assert float(after.effective) == 0
    assert float(after.negative) == 1 - float(tx.update(gradients(), state)[1].negative)
    mean = jax.tree.map(lambda g: -jnp.mean(g, axis=0), gradients())
    # weights 1/7, 2/7 and 4/7, of 1, 2 and -1 times the mean
    assert_close(after.past.average, jax.tree.map(lambda m: -m / 7, mean), 2e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64])
def test_dtypes(dtype):
    grads = gradients(dtype=dtype)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if dtype == jnp.bfloat16 else x, grads)
    tx = reweight()
    state, wide_state = after_steps(tx, grads, 1), after_steps(tx, wide, 1)
    update, state = tx.update(grads, state)
    expected, wide_state = tx.update(wide, wide_state)
    assert update["w"].dtype == dtype
    assert_close(state.past, wide_state.past)  # float32 or wider, whatever came
    for x, y in zip(jax.tree.leaves(update), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x.astype(y.dtype), y, rtol=2**-7, atol=1e-6)


def test_float64():
    with jax.enable_x64(True):
        stack = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 6)))
        tx = reweight(num_batches=4)
        state = tx.init(stack[0, 0])
        for step in stack:
            update, state = tx.update(step, state)
        assert state.past.average.dtype == state.past.weight.dtype == jnp.float64
        past = oracle.average_of([[np.mean(x, axis=0)] for x in stack[:2]], 0.9)
        answer = oracle.reweight([np.asarray(stack[2])], [0], past=past)
        np.testing.assert_allclose(update, answer.update[0], rtol=1e-11, atol=1e-13)


# -------------------------------------------------------------------------- schedules, resumption


def test_scheduled_decay():
    """Each step's decay is its own: a_t = a + (1-d)/w (m - a), w = d w + 1 - d."""
    tx = optax.inject_hyperparams(optax_bilevel.bilevel_reweight)(
        validation="past", decay=lambda count: jnp.array([0.5, 0.25, 0.75])[count]
    )
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 6)), jnp.float32)
    state = tx.init(stack[0, 0])
    update = jax.jit(tx.update)
    for step in stack:
        _, state = update(step, state)
    assert update._cache_size() == 1
    means = np.mean(np.asarray(stack, np.float64), axis=1)
    shares = np.array([0.5 * 0.25 * 0.75, 0.75 * 0.75, 0.25])
    np.testing.assert_allclose(state.inner_state.past.weight, shares.sum(), rtol=1e-6)
    expected = shares @ means / shares.sum()
    np.testing.assert_allclose(state.inner_state.past.average, expected, rtol=1e-5, atol=1e-6)


def test_resumed_from_a_copy_it_goes_on_in_the_same_bits():
    tx = optax.chain(reweight(), optax.sgd(0.1, momentum=0.9))
    update = jax.jit(tx.update)
    state, updates = tx.init(jax.tree.map(lambda x: x[0], gradients())), []
    for seed in range(6):
        if seed == 3:
            flat, treedef = jax.tree.flatten(state)
            saved = [np.asarray(x).tobytes() for x in flat], flat, treedef
        grads = jax.tree.map(lambda x, s=seed: x + jnp.sin(x * s), gradients())
        new, state = update(grads, state)
        updates.append(new)
    data, flat, treedef = saved
    state = treedef.unflatten(
        [
            jnp.asarray(np.frombuffer(bits, x.dtype).reshape(x.shape))
            for bits, x in zip(data, flat, strict=True)
        ]
    )
    for seed in range(3, 6):
        grads = jax.tree.map(lambda x, s=seed: x + jnp.sin(x * s), gradients())
        new, state = update(grads, state)
        jax.tree.map(np.testing.assert_array_equal, new, updates[seed])


# ---------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("form", ["reweight", "multi_steps"])
def test_the_past_is_sharded_like_the_parameters(form, axis_type):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    stack = stack_of(3, [(4, 8)], 4)[0]
    if form == "reweight":
        tx = reweight()
    else:
        tx = optax_bilevel.bilevel_multi_steps(optax.identity(), 1, validation="past")
    stacked = form == "reweight"
    all_grads = [(1 + i) * stack if stacked else stack[i] for i in range(3)]
    plain, all_expected = tx.init(jnp.zeros((4, 8))), []
    update = jax.jit(tx.update)
    for grads in all_grads:
        expected, plain = update(grads, plain)
        all_expected.append((expected, plain.past))
    with jax.set_mesh(mesh):
        params = jax.device_put(np.ones((4, 8), np.float32), NamedSharding(mesh, P("x", "y")))
        state = tx.init(params)
        types = jax.tree.map(jax.typeof, state)
        assert jax.tree.map(jax.typeof, jax.jit(tx.init)(params)) == types
        assert state.past.average.sharding.is_equivalent_to(params.sharding, 2)
        update = jax.jit(tx.update)
        for grads, expected in zip(all_grads, all_expected, strict=True):
            spec = P(None, "x", "y") if stacked else P("x", "y")
            placed = jax.device_put(grads, NamedSharding(mesh, spec))
            updates, state = update(placed, state, params)
            assert jax.tree.map(jax.typeof, state) == types
            assert state.past.average.sharding.is_equivalent_to(params.sharding, 2)
            assert_close((updates, state.past), expected)


# ---------------------------------------------------------------------------------------- errors


def test_contradictory_options():
    value_and_grad = functools.partial(optax_bilevel.bilevel_value_and_grad, loss)
    many = functools.partial(optax_bilevel.bilevel_multi_steps, optax.identity(), 4)
    for factory in (optax_bilevel.bilevel_reweight, value_and_grad, many):
        with pytest.raises(ValueError, match="unknown validation 'future'; known: batch, past"):
            factory(validation="future")
        with pytest.raises(ValueError, match='num_validation = 2 is for validation="batch"'):
            factory(validation="past", num_validation=2)
        with pytest.raises(ValueError, match='decay = 0.5 is for validation="past"'):
            factory(decay=0.5)
        with pytest.raises(ValueError, match='guard = zero is for validation="past"'):
            factory(guard="zero")
        with pytest.raises(ValueError, match="unknown guard 'on'; known: zero, none"):
            factory(validation="past", guard="on")
        for decay in (-0.1, 1.0, float("nan")):
            with pytest.raises(ValueError, match=f"at least 0 and below 1, got {decay}"):
                factory(validation="past", decay=decay)
        with pytest.raises(ValueError, match="decay is a schedule; wrap the factory"):
            factory(validation="past", decay=optax.constant_schedule(0.5))


def test_stacked_form_needs_parameters_and_a_stack():
    tx = reweight()
    with pytest.raises(ValueError, match="init.None. cannot know the shapes of the past"):
        tx.init(None)
    state = tx.init({"w": jnp.zeros((3, 2))})
    with pytest.raises(ValueError, match=r"leaf \['w'\]: expected shape \(k, 3, 2\)"):
        tx.update({"w": jnp.zeros((3, 2))}, state)


def test_a_past_that_does_not_fit():
    params, batches = params_of(), batches_of(4)
    step = optax_bilevel.bilevel_value_and_grad(loss, validation="past")
    with pytest.raises(ValueError, match=r"needs the past, got None: make it by init_past.params"):
        step(params, batches)
    other = init_past({**params, "gain": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"leaf \['gain'\]: expected shape \(\) of float32, got"):
        step(params, batches, other)
    with pytest.raises(ValueError, match="differ in structure"):
        step(params, batches, init_past(params["layer"]))
    with pytest.raises(ValueError, match='past is for validation="past"'):
        optax_bilevel.bilevel_value_and_grad(loss)(params, batches, init_past(params))

    def per_device(grads, past):
        return optax_bilevel.bilevel_pmean(grads, "k", validation="past", past=past)

    with pytest.raises(ValueError, match=r"num_devices=4\), a row for each device"):
        jax.vmap(per_device, axis_name="k", in_axes=(0, None))(jnp.ones((4, 6)), None)
    whole = init_past(jnp.ones(6))
    with pytest.raises(ValueError, match=r"expected shape \(2,\) of float32, got \(6,\)"):
        jax.vmap(per_device, axis_name="k", in_axes=(0, None))(jnp.ones((4, 6)), whole)
