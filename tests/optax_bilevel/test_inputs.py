"""What each input gets: the table of the documentation, row by row."""

import functools
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_bilevel
from tests.optax_bilevel.problems import assert_close, assert_nothing, distance, stack_of

PARAMS = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(5)}
COHERENT = optax_bilevel.coherent_steps(optax.sgd(1.0))
K = 4


def stack(k=K, dtype=jnp.float32):
    w, b = stack_of(0, [(3, 2), (5,)], k, dtype)
    return {"w": w, "b": b}


def mesh_of(n=8):
    return jax.make_mesh((n,), ("batch",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])


def compiled(form):
    """Compiles a form once for each set of options and shapes."""

    @functools.cache
    def jitted(**options):
        return jax.jit(functools.partial(form, **options))

    @functools.wraps(form)
    def call(grads, **options):
        return jitted(**options)(grads)

    return call


# The forms on k given gradients: (grads, **options) -> (update, weights, dropped or None).


@compiled
def reweight(grads, **options):
    k = jax.tree.leaves(grads)[0].shape[0]
    tx: Any = optax_bilevel.bilevel_reweight(**options, num_batches=k)
    params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:], g.dtype), grads)
    update, state = tx.update(grads, tx.init(params), None)
    return update, state.weights, state.dropped


@compiled
def stream(grads, **options):
    """The gradient of a sum of products is one of the factors."""

    def loss(params, batch):
        products = jax.tree.map(lambda p, g: jnp.sum(p * g), params, batch)
        return sum(jax.tree.leaves(products))

    params = jax.tree.map(lambda g: jnp.ones_like(g[0]), grads)
    _, update, weights = optax_bilevel.bilevel_value_and_grad(loss, **options)(params, grads)
    return update, weights, None


@compiled
def multi_steps(grads, **options):
    k = jax.tree.leaves(grads)[0].shape[0]
    tx: Any = optax_bilevel.bilevel_multi_steps(optax.identity(), k, **options)
    state = tx.init(jax.tree.map(lambda g: g[0], grads))
    state, updates = jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], state, grads)
    return jax.tree.map(lambda x: x[-1], updates), state.weights, state.dropped


@compiled
def collective(grads, **options):
    k = jax.tree.leaves(grads)[0].shape[0]

    def per_device(grads):
        grads = jax.tree.map(lambda x: x[0], grads)
        return optax_bilevel.bilevel_pmean_and_weights(grads, "batch", **options)

    mapped = jax.shard_map(per_device, mesh=mesh_of(k), in_specs=P("batch"), out_specs=P())
    update, weights = mapped(grads)
    return update, weights, None


FORMS = {
    "reweight": reweight,
    "value_and_grad": stream,
    "multi_steps": multi_steps,
    "pmean": collective,
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


# ------------------------------------------------- leading axes, scalars, k, unstacked gradients


def test_leading_axes_that_differ():
    grads = {"layer": {"w": jnp.ones((4, 3, 2)), "z": jnp.ones((5, 2))}}
    message = re.escape(
        "gradient leaf ['layer']['z']: expected a leading axis of k = 4 mini-batches "
        "(from leaf ['layer']['w']), got shape (5, 2)"
    )
    tx: Any = optax_bilevel.bilevel_reweight()
    with pytest.raises(ValueError, match=message):
        jax.jit(tx.update)(grads, tx.init(None))
    with pytest.raises(ValueError, match=message):
        optax_bilevel.bilevel_weights(grads)
    step = optax_bilevel.bilevel_value_and_grad(lambda p, b: p)
    with pytest.raises(ValueError, match=message.replace("gradient", "batch")):
        jax.jit(step)(jnp.ones(()), grads)


def test_leading_axis_unlike_num_batches():
    tx: Any = optax_bilevel.bilevel_reweight(num_batches=6)
    message = (
        r"leaf \['b'\]: expected .* k = 6 mini-batches \(from num_batches\), got shape \(4, 5\)"
    )
    with pytest.raises(ValueError, match=message):
        tx.update(stack(), tx.init(None))


def test_scalar_leaf():
    message = r"leaf \['s'\]: expected a leading axis of k mini-batches, got a scalar"
    with pytest.raises(ValueError, match=message):
        optax_bilevel.bilevel_weights({"a": jnp.ones((4, 2)), "s": jnp.ones(())})
    with pytest.raises(ValueError, match="batch " + message):
        optax_bilevel.bilevel_value_and_grad(lambda p, b: p)(jnp.ones(()), {"s": jnp.ones(())})


@pytest.mark.parametrize("num_validation", [4, 5])
def test_nothing_left_to_train_on(num_validation):
    message = (
        f"k = 4 mini-batches with num_validation = {num_validation} leave none to train on: "
        f"k must be at least {num_validation + 1}"
    )
    options = {"num_validation": num_validation}
    for call in (
        lambda: optax_bilevel.bilevel_weights(stack(), **options),
        lambda: reweight(stack(), **options),
        lambda: stream(stack(), **options),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(
        ValueError, match=message.replace("k = 4 mini-batches", "every_k = 4 calls")
    ):
        optax_bilevel.bilevel_multi_steps(optax.sgd(1.0), 4, **options)
    with pytest.raises(ValueError, match=f"axis 'batch' has 4 devices.* {num_validation + 1}"):
        collective(stack(), **options)


@pytest.mark.parametrize("shape", [(3, 2), (4, 2, 3), (2, 4, 3, 2), (4, 6)])
def test_unstacked_gradients(shape):
    grads = {**stack(), "w": jnp.ones(shape)}
    tx = optax_bilevel.bilevel_reweight()
    message = re.escape(
        "gradient leaf ['w']: expected shape (k, 3, 2) for a parameter of shape (3, 2), "
        f"got {shape}. Stack the k mini-batch gradients"
    )
    with pytest.raises(ValueError, match=message):
        jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)


def test_stacked_gradients_where_one_is_expected():
    tx = optax_bilevel.bilevel_multi_steps(optax.sgd(1.0), K)
    message = re.escape("['b']: expected the parameter's shape (5,), got (4, 5)")
    with pytest.raises(ValueError, match=message + ".*use bilevel_reweight"):
        tx.update(stack(), tx.init(PARAMS), PARAMS)


def test_gradients_of_another_structure_than_the_parameters():
    tx = optax_bilevel.bilevel_reweight()
    with pytest.raises(ValueError, match="gradients and params differ in structure"):
        tx.update({"w": stack()["w"]}, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(("leaf", "got"), [(jnp.ones((4, 2), jnp.int32), "int32"), (1.0, "float")])
def test_leaves_that_are_not_floating_point(leaf, got):
    message = rf"leaf \['i'\]: expected a floating-point array, got {got}"
    with pytest.raises(ValueError, match=message):
        optax_bilevel.bilevel_weights({"a": jnp.ones((4, 2)), "i": leaf})


# ------------------------------------------------------------------------------ hyper-parameters

FACTORIES = {
    "bilevel_reweight": optax_bilevel.bilevel_reweight,
    "bilevel_weights": functools.partial(optax_bilevel.bilevel_weights, stack()),
    "bilevel_value_and_grad": functools.partial(optax_bilevel.bilevel_value_and_grad, jnp.sum),
    "bilevel_multi_steps": functools.partial(optax_bilevel.bilevel_multi_steps, optax.sgd(1.0), 4),
    "bilevel_pmean": functools.partial(optax_bilevel.bilevel_pmean, stack(), "batch"),
}
every_factory = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)


@every_factory
@pytest.mark.parametrize(
    "value", [0, -1.0, float("nan"), float("inf"), np.float32(0), np.array(-1.0), jnp.array(-1.0)]
)
@pytest.mark.parametrize(("name", "default"), [("lam", 1.0), ("mu", 0.01)])
def test_hyper_parameters_out_of_range(factory, name, default, value):
    message = (
        rf"{name} must be a positive finite number, got {value}; the paper uses {name}={default}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        factory(**{name: value})


@every_factory
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_num_validation_out_of_range(factory, value):
    message = f"num_validation must be an integer of at least 1, got {value}"
    with pytest.raises(ValueError, match=message):
        factory(num_validation=value)


def test_half_a_mini_batch():
    with pytest.raises(ValueError, match=r"every_k must be an integer of at least 1, got 2\.5"):
        optax_bilevel.bilevel_multi_steps(optax.sgd(1.0), 2.5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("tx", "held_out"),
    [
        (optax_bilevel.bilevel_multi_steps(optax.sgd(0.5), 2), {}),
        (optax_bilevel.coherent_steps(optax.sgd(0.5)), {"alignment": jnp.ones(2)}),
    ],
)
def test_python_floats_are_parameters_and_gradients(tx: Any, held_out):
    _, state = tx.update({"w": 1.0}, tx.init({"w": 2.0}), {"w": 2.0}, **held_out)
    updates, _ = tx.update({"w": 1.0}, state, {"w": 2.0}, **held_out)
    np.testing.assert_allclose(updates["w"], -0.5, rtol=0.1)


@every_factory
def test_unknown_names(factory):
    with pytest.raises(ValueError, match="unknown groups 'layer'; known: None, \"leaf\", a pytree"):
        factory(groups="layer")
    with pytest.raises(
        ValueError, match=r"mu is a schedule; .*inject_hyperparams.*\(mu=schedule\)"
    ):
        factory(mu=optax.constant_schedule(0.1))


@pytest.mark.parametrize("name", ["bilevel_reweight", "bilevel_weights", "bilevel_pmean"])
def test_unknown_solver(name):
    with pytest.raises(ValueError, match="unknown solver 'cg'; known: diagonal, exact"):
        FACTORIES[name](solver="cg")


@pytest.mark.parametrize("value", [0, 1.5])
def test_microbatch_size_out_of_range(value):
    message = f"microbatch_size must be an integer of at least 1, got {value}"
    with pytest.raises(ValueError, match=message):
        optax_bilevel.bilevel_value_and_grad(jnp.sum, microbatch_size=value)


@pytest.mark.parametrize("make", [list, tuple])
@pytest.mark.parametrize("one", [{"x": jnp.ones((2, 3))}, (jnp.ones((2, 3)), jnp.ones(2))])
def test_mini_batches_that_are_not_stacked(make, one):
    step = optax_bilevel.bilevel_value_and_grad(lambda w, batch: jnp.sum(w))
    message = rf"a {make.__name__} of 3 mini-batches: stack them .*jnp.stack\(x\), \*batches\)"
    with pytest.raises(ValueError, match=message):
        step(jnp.ones(2), make([one] * 3))


def unfiltered():
    """An Equinox module has its activation function for a leaf."""
    return eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": jnp.ones(2), "i": jnp.ones(2, jnp.int32)}, r"leaf \['i'\]: .* got int32. Give init"),
        ({"w": jnp.ones(2), "b": jnp.ones(2, bool)}, r"leaf \['b'\]: .* got bool. Give init"),
        ({"w": jnp.ones(2), "n": 3}, r"leaf \['n'\]: .* got int. Give init"),
        ({"w": jnp.ones(2), "f": jnp.tanh}, r"leaf \['f'\]: .* got \w+. Give init"),
        ({"w": jnp.ones(2), "key": jax.random.key(0)}, r"leaf \['key'\]: .* got key<fry>. Give"),
        (unfiltered(), r"leaf .activation: expected .*eqx.filter\(model, eqx.is_inexact_array\)"),
    ],
)
@pytest.mark.parametrize(
    "make",
    [functools.partial(optax_bilevel.bilevel_multi_steps, every_k=4), optax_bilevel.coherent_steps],
)
def test_parameters_that_cannot_be_averaged_are_named(make, params, message):
    with pytest.raises(ValueError, match=message):
        make(optax.sgd(0.1)).init(params)


def test_groups_that_do_not_fit():
    with pytest.raises(ValueError, match="groups must be a pytree of labels like the gradients"):
        optax_bilevel.bilevel_weights(stack(), groups={"w": "a", "c": "b"})


def test_groups_without_parameters_at_init():
    tx: Any = optax_bilevel.bilevel_reweight(groups="leaf", num_batches=K)
    with pytest.raises(ValueError, match="with groups and num_batches pass the parameters"):
        tx.init(None)


@pytest.mark.parametrize("axes", ["batch", "examples"])
def test_gradients_already_summed_over_the_devices(axes):
    """shard_map sums gradients of replicated parameters: too late to weigh them, or to average."""
    mesh = jax.make_mesh((4, 2), ("batch", "examples"), axis_types=(AxisType.Auto,) * 2)
    summed = {"batch": "examples", "examples": "batch"}[axes]

    def per_device(w, x):
        w = jax.lax.pcast(w, axes, to="varying")
        grads = {"w": jax.grad(lambda w: jnp.mean(x * w))(w)}
        return optax_bilevel.bilevel_pmean(grads, "batch", example_axis="examples")

    specs = {"in_specs": (P(), P("batch", "examples")), "out_specs": P()}
    message = (
        rf"leaf \['w'\] is the same on all devices of axis '{summed}'.*"
        rf"jax.lax.pcast\(params, '{summed}', to=\"varying\"\)"
    )
    with pytest.raises(ValueError, match=message):
        jax.shard_map(per_device, mesh=mesh, **specs)(jnp.ones(()), jnp.ones((4, 2)))


# ------------------------------------------------------------------------------------------ zeros


@every_form
@pytest.mark.parametrize("normalize", [True, False])
def test_all_training_gradients_zero(form, normalize):
    grads = jax.tree.map(lambda g: np.concatenate([g[:1], 0 * g[1:]]), stack())
    update, weights, _ = form(grads, normalize=normalize)
    assert_nothing((update, weights))


@pytest.mark.parametrize(
    ("form", "options"),
    [
        *((form, {}) for form in FORMS.values()),
        *((form, {"solver": "exact"}) for form in (reweight, collective)),
    ],
)
def test_all_weights_zero(form, options):
    """Orthogonal to the validation gradient, which may itself be zero."""
    for first in (1.0, 0.0):
        grads = {"w": np.array([[first, 0], [0, 2], [0, -3]], np.float32)}
        update, weights, _ = form(grads, **options)
        assert_nothing((update, weights))


@every_form
def test_all_weights_negative_and_clipped(form):
    grads = {"w": np.array([[1], [-1], [-2]], np.float32)}
    update, weights, _ = form(grads, nonnegative=True)
    assert_nothing((update, weights))


@pytest.mark.parametrize("scale", [1e-17, 1e-19, 1e-20, 1e-30])
@pytest.mark.parametrize("mu", [0.01, 1e6])
def test_vanishing_gradients_give_no_nan(scale, mu):
    """Weights beside the smallest normal number: all of them, or nothing."""
    update, weights, _ = reweight(jax.tree.map(lambda g: g * np.float32(scale), stack()), mu=mu)
    assert np.isfinite(np.concatenate([x.ravel() for x in jax.tree.leaves(update)])).all()
    assert np.abs(weights).sum() == pytest.approx(1, abs=1e-5) or not np.any(weights)


# ------------------------------------------------------------------------------------ NaN and Inf


@every_form
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_one_training_mini_batch_not_finite(form, bad):
    grads = stack(k=5)
    rest = jax.tree.map(lambda g: np.delete(g, 2, axis=0), grads)
    grads["w"][2, 1, 0] = bad
    update, weights, dropped = form(grads)
    expected, expected_weights, _ = form(rest)
    assert_close(update, expected)
    np.testing.assert_allclose(np.delete(weights, 2), expected_weights, atol=1e-6)
    assert weights[2] == 0
    assert dropped is None or dropped == 1


@pytest.mark.parametrize("options", [{"solver": "exact"}, {"groups": "leaf"}])
def test_one_training_mini_batch_not_finite_with(options):
    """Out in one leaf is out in all of them."""
    grads = stack(k=5)
    rest = jax.tree.map(lambda g: np.delete(g, 2, axis=0), grads)
    grads["w"][2, 1, 0] = np.nan
    for form in (reweight, collective):
        update, weights, dropped = form(grads, **options)
        assert_close(update, form(rest, **options)[0], 2e-6)
        assert not np.any(weights[..., 2])
        assert dropped is None or dropped == 1


def test_all_training_mini_batches_not_finite():
    grads = jax.tree.map(lambda g: np.concatenate([g[:1], np.nan * g[1:]]), stack())
    update, weights, dropped = reweight(grads)
    assert_nothing((update, weights))
    assert dropped == 3


@every_form
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("num_validation", [1, 2])
def test_validation_gradient_not_finite(form, bad, num_validation):
    grads = stack()
    grads["b"][num_validation - 1, 0] = bad
    for normalize in (True, False):
        options = {"num_validation": num_validation, "normalize": normalize}
        update, weights, dropped = form(grads, **options)
        assert_nothing((update, weights))
        assert dropped is None or dropped == 1


def test_multi_steps_recovers_in_the_next_window():
    tx: Any = optax_bilevel.bilevel_multi_steps(optax.identity(), K)
    update = jax.jit(tx.update)
    updates, state = None, tx.init(PARAMS)
    for broken in (True, False):
        for i in range(K):
            grads = jax.tree.map(lambda g, i=i: g[i], stack())
            if broken and i == 0:
                grads = jax.tree.map(lambda g: g * np.float32(np.nan), grads)
            updates, state = update(grads, state)
    assert_close(updates, reweight(stack())[0])
    assert state.dropped == 0


# --------------------------------------------------------------------------------- other dtypes


@every_form
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(form, dtype):
    """Products in float32: 1e4 per entry, squared, is beyond float16; the dtype stays."""
    grads = jax.tree.map(lambda g: (np.sign(g) * 1e4).astype(dtype), stack())
    update, weights, _ = form(grads)
    expected, expected_weights, _ = form(jax.tree.map(lambda g: g.astype(np.float32), grads))
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5)
    assert np.abs(weights).sum() == pytest.approx(1)
    for u, e in zip(jax.tree.leaves(update), jax.tree.leaves(expected), strict=True):
        assert u.dtype == dtype
        np.testing.assert_array_equal(u, np.asarray(e).astype(dtype))


@pytest.mark.parametrize("form", [reweight, multi_steps, collective])
def test_complex_gradients_are_two_real_ones(form):
    grads = stack(dtype=jnp.complex64)
    update, weights, _ = form(grads)
    parts = jax.tree.map(lambda g: np.stack([g.real, g.imag], axis=-1), grads)
    expected, expected_weights, _ = form(parts)
    assert distance(weights, expected_weights) <= 1e-6
    assert update["w"].dtype == jnp.complex64
    assert_close(jax.tree.map(lambda g: np.stack([g.real, g.imag], -1), update), expected)


def test_numpy_gradients_without_jit():
    grads = stack()
    assert isinstance(grads["w"], np.ndarray)
    tx = optax_bilevel.bilevel_reweight()
    assert_close(tx.update(grads, tx.init(PARAMS), PARAMS)[0], reweight(stack())[0])


# ------------------------------------------------------------------- None, empty trees, masks


def test_none_leaves_pass_through():
    grads = {**stack(), "frozen": None}
    for form in (reweight, multi_steps, collective):
        update, weights, _ = form(grads)
        assert update.pop("frozen") is None
        expected, expected_weights, _ = form(stack())
        assert_close((update, weights), (expected, expected_weights))


@pytest.mark.parametrize("empty", [{}, (), None, {"a": None, "b": {}}])
def test_empty_trees_pass_through(empty):
    for tx in (
        optax_bilevel.bilevel_reweight(),
        optax_bilevel.bilevel_reweight(groups="leaf"),
        optax_bilevel.bilevel_multi_steps(optax.sgd(1.0), 3),
    ):
        state = tx.init(empty)
        update, new_state = tx.update(empty, state, empty)
        assert update == empty
        assert jax.tree.structure(new_state) == jax.tree.structure(state)
    with pytest.raises(ValueError, match="at least one gradient leaf, got an empty tree"):
        optax_bilevel.bilevel_weights(empty)
    with pytest.raises(ValueError, match="need at least one leaf each"):
        optax_bilevel.bilevel_value_and_grad(lambda p, b: jnp.sum(b))(empty, jnp.ones((3, 2)))


def test_leaves_without_entries():
    empty = np.zeros((K, 0, 3), np.float32)
    update, weights, _ = reweight({**stack(), "empty": empty})
    assert update.pop("empty").shape == (0, 3)
    assert_close((update, weights), reweight(stack())[:2])
    assert collective({**stack(), "empty": empty})[0]["empty"].shape == (0, 3)


def test_masked_leaves():
    masked = {**stack(), "b": optax.MaskedNode()}
    message = r"leaf \['b'\] is hidden .* Put masks after the reweighting, which belongs first"
    for call in (
        lambda: optax_bilevel.bilevel_weights(masked),
        lambda: optax_bilevel.bilevel_reweight().init(masked),
        lambda: collective(masked),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    message = r"leaf \['b'\] is hidden .* Put masks inside, around the optimizer that is wrapped"
    for tx in (optax_bilevel.bilevel_multi_steps(optax.sgd(1.0), 3), COHERENT):
        with pytest.raises(ValueError, match="parameter " + message):
            tx.init({**PARAMS, "b": optax.MaskedNode()})
        with pytest.raises(ValueError, match="gradient " + message):
            tx.update({**PARAMS, "b": optax.MaskedNode()}, tx.init(PARAMS), alignment=jnp.ones(2))
    tx: Any = optax_bilevel.bilevel_reweight(allow_masked=True)
    update, _ = tx.update(masked, tx.init(masked))
    assert update["b"] == optax.MaskedNode()
    assert_close(update["w"], reweight({"w": stack()["w"]})[0]["w"])


# --------------------------------------------------- what any optax transformation must take


@pytest.mark.parametrize(
    "params",
    [
        None,
        PARAMS,
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS),
        jax.eval_shape(lambda: PARAMS),
    ],
)
def test_any_parameters_at_init(params):
    tx = optax_bilevel.bilevel_reweight(num_batches=K)
    assert_close(tx.update(stack(), tx.init(params))[0], reweight(stack())[0])


@pytest.mark.parametrize("params", [None, PARAMS])
def test_unknown_extra_args(params):
    tx = optax_bilevel.bilevel_reweight()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    update, _ = tx.update(stack(), tx.init(PARAMS), params, value=1.0, unknown="x")
    assert_close(update, reweight(stack())[0])


def test_extra_args_reach_the_optimizer_of_multi_steps():
    def record(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda x: x * value, updates), state

    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, record)  # pyright: ignore[reportArgumentType]
    tx = optax_bilevel.bilevel_multi_steps(inner, K)
    updates, state = None, tx.init(PARAMS)
    for i in range(K):
        grads = jax.tree.map(lambda g, i=i: g[i], stack())
        updates, state = tx.update(grads, state, PARAMS, value=2.0)
    assert_close(updates, jax.tree.map(lambda x: 2 * x, reweight(stack())[0]))


def test_inject_hyperparams_as_it_stands():
    """Both scheduled, nothing static; in test_compositions.py with jit and more options."""
    schedule = optax.linear_schedule(0.1, 1.1, 10)
    tx = optax.inject_hyperparams(optax_bilevel.bilevel_reweight)(mu=schedule)
    state = tx.init(PARAMS)
    for step in range(3):
        update, state = tx.update(stack(), state, PARAMS)
        assert_close(update, reweight(stack(), mu=0.1 + 0.1 * step)[0])
