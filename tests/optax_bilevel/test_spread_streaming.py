"""Several mini-batches on every device: each streams its own, one exchange, the same update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_bilevel
from tests.optax_bilevel.problems import (
    assert_close,
    assert_nothing,
    batches_of,
    distance,
    loss,
    params_of,
    slow,
    stack_of,
    stacked_gradients,
)

DEVICES = 8


def with_aux(params, batch):
    value = loss(params, batch)
    return value, {"first": batch["x"][0, 0], "twice": 2 * value}


def spread(params, batches, mesh=None, axis="batch", check_vma=True, loss_fn=with_aux, **options):
    """The k mini-batches over all devices of a mesh."""
    mesh = mesh or jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,))
    step = optax_bilevel.bilevel_value_and_grad(loss_fn, has_aux=True, axis_name=axis, **options)

    def on_device(params, validation, own):
        join = lambda v, x: jnp.concatenate([v, x])  # noqa: E731
        return step(params, jax.tree.map(join, validation, own))

    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P(), P(), P(axis)),
        out_specs=((P(axis), P(axis)), P(), P()),
        check_vma=check_vma,
    )
    validation = jax.tree.map(lambda x: x[: options.get("num_validation", 1)], batches)
    return jax.jit(mapped)(params, validation, batches)


def alone(params, batches, loss_fn=with_aux, **options):
    step = optax_bilevel.bilevel_value_and_grad(loss_fn, has_aux=True, **options)
    return jax.jit(step)(params, batches)


def stacked(params, batches, **options):
    grads = stacked_gradients(params, batches)
    tx = optax_bilevel.bilevel_reweight(**options, num_batches=len(batches["x"]))
    update, state = jax.jit(tx.update)(grads, tx.init(params), params)
    return update, state.weights


OPTIONS = {
    "defaults": {},
    "three validation": {"num_validation": 3},
    "unnormalised": {"normalize": False},
    "per leaf": {"groups": "leaf", "nonnegative": True, "num_validation": 2},
}


@pytest.mark.parametrize(
    ("m", "option", "microbatch_size", "check_vma"),
    [
        (1, "three validation", None, True),
        (3, "per leaf", 2, True),
        slow(2, "defaults", 1, True),
        slow(4, "three validation", 1, False),
        slow(2, "unnormalised", 2, True),
        slow(2, "per leaf", 3, True),
        slow(1, "defaults", 1, True),
    ],
)
def test_equals_one_device(m, option, microbatch_size, check_vma):
    """Losses, aux, gradients and weights of the stream on one device; the stack's too."""
    params, batches = params_of(), batches_of(m * DEVICES)
    options = {**OPTIONS[option], "mu": 0.1}
    form = {"microbatch_size": microbatch_size, "check_vma": check_vma}
    actual = spread(params, batches, **form, **options)
    assert_close(actual, alone(params, batches, **options))
    for part, expected in zip(actual[1:], stacked(params, batches, **options), strict=True):
        assert distance(part, expected) <= 1e-6
    np.testing.assert_array_equal(actual[0][1]["first"], batches["x"][:, 0, 0])
    assert distance(actual[1], jax.tree.map(lambda x: 0 * x + 1, actual[1])) > 1e-2


@pytest.mark.parametrize("axis_type", [slow(AxisType.Auto), AxisType.Explicit])
def test_meshes_of_two_axes(axis_type):
    """One mini-batch axis made of both mesh axes, everything placed beforehand."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    params, batches = params_of(), batches_of(2 * DEVICES)
    with jax.set_mesh(mesh):
        replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(("x", "y")))
        placed = jax.device_put(params, replicated)
        step = optax_bilevel.bilevel_value_and_grad(with_aux, has_aux=True, axis_name=("x", "y"))
        join = functools.partial(jax.tree.map, lambda v, x: jnp.concatenate([v, x]))
        mapped = jax.jit(
            jax.shard_map(
                lambda params, validation, own: step(params, join(validation, own)),
                in_specs=(P(), P(), P(("x", "y"))),
                out_specs=((P(("x", "y")), P(("x", "y"))), P(), P()),
            )
        )
        validation = jax.device_put(jax.tree.map(lambda x: x[:1], batches), replicated)
        actual = mapped(placed, validation, jax.device_put(batches, split))
    assert_close(actual, alone(params, batches))
    for x in jax.tree.leaves(actual[1]):
        assert x.sharding.is_equivalent_to(replicated, x.ndim)


def test_beside_an_axis_of_examples():
    """The loss is a mean over a second axis: its gradients are whole, and added up once."""
    mesh = jax.make_mesh((4, 2), ("k", "e"), axis_types=(AxisType.Auto,) * 2)
    params, batches = params_of(), batches_of(8, b=6)
    step = optax_bilevel.bilevel_value_and_grad(
        lambda params, batch: jax.lax.pmean(loss(params, batch), "e"), axis_name="k"
    )

    def on_device(params, validation, own):
        return step(params, jax.tree.map(lambda v, x: jnp.concatenate([v, x]), validation, own))

    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(P(), P(None, "e"), P("k", "e")),
        out_specs=(P("k"), P(), P()),
    )
    actual = jax.jit(mapped)(params, jax.tree.map(lambda x: x[:1], batches), batches)
    assert_close(actual[1:], stacked(params, batches))


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_pmap():
    params, batches = params_of(), batches_of(2 * DEVICES)
    step = optax_bilevel.bilevel_value_and_grad(loss, axis_name="batch")
    own = jax.tree.map(lambda x: x.reshape(DEVICES, 2, *x.shape[1:]), batches)
    handed = jax.tree.map(
        lambda v, x: jnp.concatenate(
            [jnp.broadcast_to(v[None, :1], (DEVICES, 1, *v.shape[1:])), x], 1
        ),
        batches,
        own,
    )
    losses, grads, weights = jax.pmap(step, axis_name="batch", in_axes=(None, 0))(params, handed)
    expected = alone(params, batches)
    assert distance(losses.reshape(-1), expected[0][0]) <= 1e-6
    for device in (0, 7):
        result = jax.tree.map(lambda x, d=device: np.asarray(x[d]), (grads, weights))
        assert distance(result, expected[1:]) <= 1e-6


def linear(w, batch):
    """A gradient that is the batch itself."""
    return jnp.sum(w * batch), ()


@pytest.mark.parametrize(("bad", "place"), [(np.nan, 1), (np.inf, 6), (np.nan, 15)])
def test_a_mini_batch_that_is_not_finite_takes_no_part(bad, place):
    grads = stack_of(3, [(5,)], 16)[0]
    grads[place, 2] = bad
    _, update, weights = spread(jnp.zeros(5), grads, loss_fn=linear)
    kept = np.delete(grads, place, axis=0)
    _, expected, expected_weights = alone(jnp.zeros(5), kept, loss_fn=linear)
    assert weights[place] == 0
    assert distance(np.delete(weights, place), expected_weights) <= 1e-6
    assert_close(update, expected)


@pytest.mark.parametrize("place", [0, 1])
def test_a_validation_gradient_that_is_not_finite_gives_zeros(place):
    grads = stack_of(3, [(5,)], 16)[0]
    grads[place, 2] = np.nan
    _, update, weights = spread(jnp.zeros(5), grads, loss_fn=linear, num_validation=2)
    assert_nothing((update, weights))


def test_gradients_of_zero_give_zeros():
    grads = stack_of(3, [(5,)], 16)[0]
    grads[1:] = 0
    assert_nothing(spread(jnp.zeros(5), grads, loss_fn=linear)[1:])


def test_bfloat16_parameters():
    """Sums in float32, the update in the parameters' dtype, no overflow of |g|²."""
    grads = stack_of(3, [(50,)], 16, scale=1e4)[0]
    params = jnp.zeros(50, jnp.bfloat16)
    loss_fn = lambda w, batch: (jnp.sum(w.astype(jnp.float32) * batch), ())  # noqa: E731
    _, update, weights = spread(params, grads, loss_fn=loss_fn)
    _, expected, expected_weights = alone(params, grads, loss_fn=loss_fn)
    assert update.dtype == jnp.bfloat16
    assert weights.dtype == jnp.float32
    assert distance(weights, expected_weights) <= 1e-6
    assert distance(update, expected) <= 2**-8


def test_one_exchange():
    """One gradient's worth of numbers is added up, and a few scalars per mini-batch."""
    k, params = 16, params_of()
    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,))
    step = optax_bilevel.bilevel_value_and_grad(loss, axis_name="batch")
    join = functools.partial(jax.tree.map, lambda v, x: jnp.concatenate([v, x]))
    mapped = jax.shard_map(
        lambda params, v, own: step(params, join(v, own)),
        mesh=mesh,
        in_specs=(P(), P(), P("batch")),
        out_specs=(P("batch"), P(), P()),
    )
    batches = batches_of(k)
    validation = jax.tree.map(lambda x: x[:1], batches)
    moved = sum(
        x.size
        for eqn in _equations(jax.make_jaxpr(mapped)(params, validation, batches).jaxpr)
        if "psum" in eqn.primitive.name or "all_" in eqn.primitive.name
        for x in (v.aval for v in eqn.invars)
    )
    assert moved == sum(x.size for x in jax.tree.leaves(params)) + 2 * k + 1


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(eqn.params):
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_k_must_leave_some_to_train_on():
    with pytest.raises(
        ValueError, match="8 devices of 1 mini-batches each with num_validation = 8"
    ):
        spread(params_of(), batches_of(8), num_validation=8)


def test_the_own_part_must_be_there():
    step = optax_bilevel.bilevel_value_and_grad(loss, axis_name="batch")
    mesh = jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("batch")), out_specs=P())
    with pytest.raises(ValueError, match="k must be at least 2"):
        mapped(params_of(), batches_of(8))
