"""On meshes of eight devices, Auto and Explicit: the update of one device, sharded like params."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_bilevel
from tests.optax_bilevel.problems import assert_close, stack_of

K = 8
SHAPES = {"kernel": (4, 8), "bias": (8,), "gain": ()}
# Which mesh axes k, the kernel's axes and the bias's axis lie on.
LAYOUTS = {
    "replicated": (None, (None, None), None),
    "k": ("x", (None, None), None),
    "parameters": (None, ("x", "y"), "y"),
    "one axis": (None, (None, ("x", "y")), ("x", "y")),
    "both": ("x", ("y", None), "y"),
    "k on both axes": (("x", "y"), (None, None), None),
}
OPTIONS = {
    "defaults": {},
    "exact": {"solver": "exact", "mu": 20.0},
    "per leaf": {"groups": "leaf", "num_validation": 2},
}
meshes = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])


def mesh_of(axis_type):
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)


def specs(layout, stacked):
    k, kernel, bias = LAYOUTS[layout]
    lead = (k,) if stacked else ()
    return {"kernel": P(*lead, *kernel), "bias": P(*lead, bias), "gain": P(*lead)}


def place(tree, mesh, layout, stacked):
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs(layout, stacked)
    )


def stack():
    return dict(zip(SHAPES, stack_of(0, list(SHAPES.values()), K), strict=True))


def params():
    return {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


@functools.cache
def expected(option):
    tx = optax_bilevel.bilevel_reweight(**OPTIONS[option], num_batches=K)
    update, state = jax.jit(tx.update)(stack(), tx.init(params()), params())
    return jax.tree.map(np.asarray, (update, state.weights))


def assert_sharded_like(tree, like):
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)


@meshes
@pytest.mark.parametrize(
    ("layout", "option"),
    [
        (layout, option)
        if option == "defaults" or layout == "both"
        else pytest.param(layout, option, marks=pytest.mark.slow)
        for layout in LAYOUTS
        for option in OPTIONS
    ],
)
def test_reweight(axis_type, layout, option):
    mesh = mesh_of(axis_type)
    tx = optax_bilevel.bilevel_reweight(**OPTIONS[option], num_batches=K)
    with jax.set_mesh(mesh):
        weights, grads = place(params(), mesh, layout, False), place(stack(), mesh, layout, True)
        update, state = jax.jit(tx.update)(grads, tx.init(weights), weights)
        assert_close((update, state.weights), expected(option))
        if axis_type == AxisType.Explicit:  # on Auto meshes the compiler chooses
            assert state.weights.sharding.is_fully_replicated
        if axis_type == AxisType.Explicit or LAYOUTS[layout][0] is None:
            assert_sharded_like(update, weights)


@meshes
@pytest.mark.parametrize("layout", ["parameters", "both"])
def test_a_step_keeps_the_parameters_sharding(axis_type, layout):
    """Momentum SGD, donated: parameters and momentum stay where they were, step after step."""
    mesh = mesh_of(axis_type)
    tx = optax.chain(optax_bilevel.bilevel_reweight(), optax.sgd(0.1, momentum=0.9))
    with jax.set_mesh(mesh):
        weights, grads = place(params(), mesh, layout, False), place(stack(), mesh, layout, True)
        before = jax.tree.map(lambda x: x.sharding, weights)

        @functools.partial(jax.jit, donate_argnums=0, out_shardings=(before, None))
        def step(weights, state, grads):
            updates, state = tx.update(grads, state, weights)
            return optax.apply_updates(weights, updates), state

        state = tx.init(weights)
        for _ in range(3):
            weights, state = step(weights, state, grads)
        moved = jax.tree.map(lambda x: x.sharding, weights)
    assert moved == before
    # m = g, 1.9 g, 2.71 g
    total = jax.tree.map(lambda p, g: p - np.float32(0.561) * g, params(), expected("defaults")[0])
    assert_close(weights, total)


@meshes
@pytest.mark.parametrize(
    ("layout", "option"), [("parameters", "defaults"), ("one axis", "per leaf")]
)
def test_multi_steps(axis_type, layout, option):
    mesh = mesh_of(axis_type)
    tx: Any = optax_bilevel.bilevel_multi_steps(optax.identity(), K, **OPTIONS[option])
    with jax.set_mesh(mesh):
        weights, grads = place(params(), mesh, layout, False), place(stack(), mesh, layout, True)
        updates, state, update = None, tx.init(weights), jax.jit(tx.update)
        for i in range(K):
            updates, state = update(jax.tree.map(lambda g, i=i: g[i], grads), state, weights)
            assert_sharded_like(updates, weights)
            assert_sharded_like(state.total, weights)
        assert_close((updates, state.weights), expected(option))


@meshes
@pytest.mark.parametrize("microbatch_size", [3, None, pytest.param(1, marks=pytest.mark.slow)])
def test_streaming(axis_type, microbatch_size):
    """Examples over one axis, features of the parameters over the other."""
    mesh = mesh_of(axis_type)
    explicit = axis_type == AxisType.Explicit
    x = stack_of(1, [(8, 4)], K)[0]

    def loss(params, x, sharded=explicit):
        out = P("y", "x") if sharded else None
        hidden = jnp.einsum("bi,io->bo", x, params["kernel"], out_sharding=out)
        return params["gain"] * jnp.mean(jnp.square(jnp.tanh(hidden + params["bias"][None])))

    step = optax_bilevel.bilevel_value_and_grad(loss, microbatch_size=microbatch_size)
    plain = functools.partial(loss, sharded=False)
    single = jax.jit(optax_bilevel.bilevel_value_and_grad(plain, microbatch_size=1))(params(), x)
    single = jax.tree.map(np.asarray, single)
    specs = {"kernel": P(None, "x"), "bias": P("x"), "gain": P()}
    with jax.set_mesh(mesh):
        weights = jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params(), specs
        )
        batches = jax.device_put(x, NamedSharding(mesh, P(None, "y")))
        losses, grads, omega = jax.jit(step)(weights, batches)
        assert_close((losses, grads, omega), single)
        if explicit:
            assert_sharded_like(grads, weights)


def test_collective_beside_an_axis_left_to_the_compiler():
    """shard_map over the mini-batches only; the parameters' axis stays Auto."""
    mesh = jax.make_mesh((4, 2), ("k", "model"), axis_types=(AxisType.Auto,) * 2)
    grads = jax.tree.map(lambda g: g[:4], stack())

    def per_device(grads):
        return optax_bilevel.bilevel_pmean(jax.tree.map(lambda g: g[0], grads), "k")

    mapped = jax.shard_map(per_device, mesh=mesh, in_specs=P("k"), out_specs=P(), axis_names={"k"})
    placed = {
        "kernel": jax.device_put(grads["kernel"], NamedSharding(mesh, P("k", None, "model"))),
        "bias": jax.device_put(grads["bias"], NamedSharding(mesh, P("k", "model"))),
        "gain": jax.device_put(grads["gain"], NamedSharding(mesh, P("k"))),
    }
    tx: Any = optax_bilevel.bilevel_reweight()
    assert_close(jax.jit(mapped)(placed), jax.jit(tx.update)(grads, tx.init(None))[0])
