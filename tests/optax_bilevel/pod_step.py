"""Compiles data-parallel steps for a TPU v5e 4x4; prints the text of the compiled programs.

Run by test_pod.py in a process of its own, with libtpu on the path.
"""

import itertools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_bilevel

WIDTHS = (784, 500, 300, 10)


def outputs(params, x):
    for w, b in params:
        x = jax.nn.relu(x @ w + b)
    return x.astype(jnp.float32)


def abstract(widths, dtype, sharding):
    return [
        (
            jax.ShapeDtypeStruct((a, b), dtype, sharding=sharding),
            jax.ShapeDtypeStruct((b,), dtype, sharding=sharding),
        )
        for a, b in itertools.pairwise(widths)
    ]


def mesh_of(devices, shape, names):
    return Mesh(np.array(devices).reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))


def compile_step(devices, widths, dtype, shape, reduce):
    """One mini-batch per device; `reduce` makes one gradient of theirs."""
    names = ("batch", "example")[: len(shape)]
    mesh = mesh_of(devices, shape, names)

    def loss(params, x):
        return jnp.mean(jnp.square(outputs(params, x)))

    def step(params, x):
        varying = jax.lax.pcast(params, names, to="varying")
        grads = reduce(jax.grad(loss)(varying, x))
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(names)), out_specs=P())
    params = abstract(widths, dtype, NamedSharding(mesh, P()))
    split = NamedSharding(mesh, P(names))
    x = jax.ShapeDtypeStruct((8 * len(devices), widths[0]), dtype, sharding=split)
    return jax.jit(mapped).lower(params, x).compile().as_text()


def compile_training(devices, tx, *, judged):
    """A data-parallel step under jit, where the compiler puts in the exchange."""
    mesh = mesh_of(devices, (len(devices),), ("data",))
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def losses(params, x):
        return jnp.mean(jnp.square(outputs(params, x)), axis=-1)

    def step(params, state, x, held_out):
        grads = jax.grad(lambda params: losses(params, x).mean())(params)
        extra = {"losses_fn": lambda params: losses(params, held_out)} if judged else {}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    params = abstract(WIDTHS, jnp.float32, replicated)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        jax.eval_shape(tx.init, params),
    )
    x, held_out = (
        jax.ShapeDtypeStruct((n, WIDTHS[0]), jnp.float32, sharding=split) for n in (64, 16)
    )
    compiled = jax.jit(step, donate_argnums=(0, 1), out_shardings=replicated)
    return compiled.lower(params, state, x, held_out).compile().as_text()


def main():
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    devices = topology.devices
    assert devices[0].platform == "tpu"
    texts = {}
    for name, widths, dtype, shape in (
        ("even", (1024, 2048, 1024), jnp.float32, (16,)),
        ("odd", WIDTHS, jnp.float32, (16,)),
        ("bfloat16", WIDTHS, jnp.bfloat16, (16,)),
        ("two axes", WIDTHS, jnp.float32, (4, 4)),
    ):
        axes = ("batch", "example")[: len(shape)]
        example_axis = "example" if len(shape) == 2 else None

        def pmean(grads, axes=axes):
            return jax.lax.pmean(grads, axes)

        texts[name] = {"pmean": compile_step(devices, widths, dtype, shape, pmean)}
        for solver in ("diagonal", "exact"):
            options: dict[str, Any] = {"solver": solver, "example_axis": example_axis}

            def reweighted(grads, options=options):
                return optax_bilevel.bilevel_pmean(grads, "batch", **options)

            texts[name][solver] = compile_step(devices, widths, dtype, shape, reweighted)

    opt = optax.sgd(0.1, momentum=0.9)
    texts["training"] = {
        "plain": compile_training(devices, opt, judged=False),
        "coherent": compile_training(devices, optax_bilevel.coherent_steps(opt), judged=True),
    }
    json.dump(texts, sys.stdout)


if __name__ == "__main__":
    main()
