"""Compiles a data-parallel step for a TPU v5e 4x4; prints the text of the compiled programs.

Run by test_pod.py in a process of its own, with libtpu on the path.
"""

import functools
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_bilevel


def compile_step(devices, widths, dtype, shape, reduce, *, past=False):
    names = ("batch", "example")[: len(shape)]
    mesh = Mesh(np.array(devices).reshape(shape), names, axis_types=(AxisType.Auto,) * len(names))

    def loss(params, x):
        for w, b in params:
            x = jax.nn.relu(x @ w + b)
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    def step(params, x, *rows):
        varying = jax.lax.pcast(params, names, to="varying")
        grads = reduce(jax.grad(loss)(varying, x), *rows)
        grads, *rows = grads if past else (grads,)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), *rows

    rows = (optax_bilevel.Past(P(names), P()),) * past
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(names), *rows), out_specs=(P(), *rows))
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(names))
    params = [
        (
            jax.ShapeDtypeStruct((a, b), dtype, sharding=replicated),
            jax.ShapeDtypeStruct((b,), dtype, sharding=replicated),
        )
        for a, b in itertools.pairwise(widths)
    ]
    x = jax.ShapeDtypeStruct((8 * len(devices), widths[0]), dtype, sharding=split)
    if past:
        make = functools.partial(optax_bilevel.init_past, num_devices=len(devices))
        shapes = jax.eval_shape(make, params)
        rows = optax_bilevel.Past(
            jax.tree.map(lambda a: a.update(sharding=split), shapes.average),
            shapes.weight.update(sharding=replicated),
        )
        return jax.jit(mapped).lower(params, x, rows).compile().as_text()
    return jax.jit(mapped).lower(params, x).compile().as_text()


def main():
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4")
    assert topology.devices[0].platform == "tpu"
    texts = {}
    for name, widths, dtype, shape in (
        ("even", (1024, 2048, 1024), jnp.float32, (16,)),
        ("odd", (784, 500, 300, 10), jnp.float32, (16,)),
        ("bfloat16", (784, 500, 300, 10), jnp.bfloat16, (16,)),
        ("two axes", (784, 500, 300, 10), jnp.float32, (4, 4)),
    ):
        axes = ("batch", "example")[: len(shape)]
        example_axis = "example" if len(shape) == 2 else None
        texts[name] = {
            "pmean": compile_step(
                topology.devices, widths, dtype, shape, lambda g, axes=axes: jax.lax.pmean(g, axes)
            ),
            **{
                solver: compile_step(
                    topology.devices,
                    widths,
                    dtype,
                    shape,
                    lambda g, solver=solver, example_axis=example_axis: optax_bilevel.bilevel_pmean(
                        g, "batch", solver=solver, example_axis=example_axis
                    ),
                )
                for solver in ("diagonal", "exact")
            },
            "coherent": compile_step(
                topology.devices,
                widths,
                dtype,
                shape,
                lambda g, example_axis=example_axis: optax_bilevel.mean_and_coherence(
                    g,
                    jax.tree.map(lambda x: jnp.full(x.shape, 0.5), g),
                    axis_name="batch",
                    example_axis=example_axis,
                )[0],
            ),
            "past": compile_step(
                topology.devices,
                widths,
                dtype,
                shape,
                lambda g, past, example_axis=example_axis: optax_bilevel.bilevel_pmean(
                    g, "batch", validation="past", past=past, example_axis=example_axis
                ),
                past=True,
            ),
        }
    json.dump(texts, sys.stdout)


if __name__ == "__main__":
    main()
