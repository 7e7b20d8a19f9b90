"""The memory of what streams does not grow with k."""

import jax
import jax.numpy as jnp
import pytest

import optax_bilevel


def mlp(params, batch):
    hidden = jax.nn.relu(batch @ params["in"])
    return jnp.mean(jnp.square(jax.nn.relu(hidden @ params["mid"]) @ params["out"]))


def convolutional(params, batch):
    images = batch.reshape(batch.shape[0], 16, 16, 1)
    for kernel in params.values():
        images = jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        images = jax.nn.relu(images)
    return jnp.mean(jnp.square(images))


PROBLEMS = {
    "mlp": (mlp, {"in": (256, 512), "mid": (512, 512), "out": (512, 10)}),
    "conv": (convolutional, {"a": (3, 3, 1, 64), "b": (3, 3, 64, 128), "c": (3, 3, 128, 8)}),
}


def temporary_bytes(function, *arguments):
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def arguments(name, k):
    shapes = PROBLEMS[name][1]
    params = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in shapes.items()}
    return params, jax.ShapeDtypeStruct((k, 4, 256), jnp.float32)


def coherent(loss, loop):
    """With the parameters for a direction."""
    step = optax_bilevel.coherent_value_and_grad(loss, loop=loop)
    return lambda params, batches: step(params, batches, params)


STREAMS = {
    "bilevel": lambda loss, loop: optax_bilevel.bilevel_value_and_grad(loss, loop=loop),
    "coherent": coherent,
}


@pytest.mark.parametrize("loop", ["unroll", "scan"])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("form", STREAMS)
def test_memory_at_32_mini_batches_is_that_at_4(form, name, loop):
    step = STREAMS[form](PROBLEMS[name][0], loop)
    at_4, at_32 = (temporary_bytes(step, *arguments(name, k)) for k in (4, 32))
    assert at_32 <= 1.02 * at_4


@pytest.mark.parametrize("loop", ["unroll", "scan"])
@pytest.mark.parametrize(("form", "count"), [("bilevel", 3), ("coherent", 2)])
def test_at_most_so_many_gradients_beside_the_networks_own_memory(form, count, loop):
    loss = PROBLEMS["mlp"][0]
    params, batches = arguments("mlp", 16)
    gradient = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    own = temporary_bytes(jax.grad(loss), params, jax.ShapeDtypeStruct((4, 256), jnp.float32))
    step = STREAMS[form](loss, loop)
    # A few hundred KiB of inner products and copies of the activations come on top.
    assert temporary_bytes(step, params, batches) <= own + (count + 0.2) * gradient


def test_the_stack_does_grow_so_the_measurement_can_fail():
    def stacked(params, batches):
        stack = jax.vmap(jax.grad(PROBLEMS["mlp"][0]), in_axes=(None, 0))(params, batches)
        rule = optax_bilevel.bilevel_reweight()
        return rule.update(stack, rule.init(params), params)[0]

    at_4, at_32 = (temporary_bytes(stacked, *arguments("mlp", k)) for k in (4, 32))
    assert at_32 > 4 * at_4
