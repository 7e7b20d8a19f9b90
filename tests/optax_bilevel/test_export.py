"""Every form lowers for CUDA, which the tests have no device for."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_bilevel
from tests.optax_bilevel.problems import batches_of, params_of


def loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["layer"]["kernel"] + params["layer"]["bias"][None])
    return jnp.mean(jnp.square(params["gain"] * hidden - batch["y"]))


def stacked(params, batches):
    tx = optax.chain(optax_bilevel.bilevel_reweight(), optax.sgd(0.1, momentum=0.9))
    grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batches)
    return tx.update(grads, tx.init(params), params)[0]


def exact(params, batches):
    tx = optax_bilevel.bilevel_reweight(solver="exact")
    grads = jax.vmap(jax.grad(loss), in_axes=(None, 0))(params, batches)
    return tx.update(grads, tx.init(params), params)[0]


def streaming(params, batches, **options):
    return optax_bilevel.bilevel_value_and_grad(loss, **options)(params, batches)[1]


def one_by_one(params, batches):
    return streaming(params, batches, microbatch_size=1)


def coherent(params, batches):
    tx = optax_bilevel.coherent_steps(optax.sgd(0.1, momentum=0.9), total_steps=100)
    held_out, batch = (jax.tree.map(lambda x, i=i: x[i], batches) for i in (0, 1))
    grads = jax.grad(loss)(params, batch)

    def losses_fn(params):
        return jax.vmap(lambda x, y: loss(params, {"x": x[None], "y": y[None]}))(*held_out.values())

    return tx.update(grads, tx.init(params), params, losses_fn=losses_fn)[0]


def multi_steps(params, batches):
    tx = optax_bilevel.bilevel_multi_steps(optax.sgd(0.1), 8)
    grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[0], batches))
    return tx.update(grads, tx.init(params), params)[0]


def on_mesh(function, axes):
    mesh = Mesh(np.array(jax.devices()[:8]), ("batch",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(P(), P(axes)), out_specs=P())
    return jax.jit(mapped, in_shardings=(NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))))


def collective(params, batches):
    varying = jax.lax.pcast(params, "batch", to="varying")
    grads = jax.grad(loss)(varying, jax.tree.map(lambda x: x[0], batches))
    return optax_bilevel.bilevel_pmean(grads, "batch")


def spread(params, batches):
    """Two mini-batches on each of eight devices."""
    step = optax_bilevel.bilevel_value_and_grad(loss, axis_name="batch", microbatch_size=1)
    validation = jax.tree.map(lambda x: x[:1], batches)

    def on_device(params, validation, own):
        join = jax.tree.map(lambda v, x: jnp.concatenate([v, x]), validation, own)
        return step(params, join)[1]

    mesh = Mesh(np.array(jax.devices()[:8]), ("batch",), axis_types=(AxisType.Auto,))
    specs = (P(), P(), P("batch"))
    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=P())
    return mapped(params, validation, batches)


def lowered(function, k=8):
    params, batches = params_of(), batches_of(k)
    return jax.export.export(function, platforms=("cuda",))(params, batches)


@pytest.mark.parametrize("function", [stacked, exact, streaming, one_by_one, coherent, multi_steps])
def test_lowers_for_cuda(function):
    exported = lowered(jax.jit(function))
    assert exported.platforms == ("cuda",)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), exported.out_avals)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), tuple(jax.tree.leaves(params_of())))
    assert tuple(shapes) == expected


def test_collective_lowers_for_cuda():
    exported = lowered(on_mesh(collective, "batch"))
    assert exported.platforms == ("cuda",)
    assert exported.nr_devices == 8
    text = exported.mlir_module()
    assert "all_to_all" in text
    assert "all_gather" in text


def test_several_mini_batches_on_each_device_lower_for_cuda():
    exported = lowered(jax.jit(spread), k=16)
    assert exported.platforms == ("cuda",)
    assert "all_reduce" in exported.mlir_module()
