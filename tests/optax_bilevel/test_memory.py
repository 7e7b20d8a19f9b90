"""The memory of what streams does not grow with k."""

import jax
import jax.numpy as jnp
import pytest

import optax_bilevel
from benchmarks import timing


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
    return timing.temporary_bytes(compiled)


def arguments(name, k):
    shapes = PROBLEMS[name][1]
    params = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in shapes.items()}
    return params, jax.ShapeDtypeStruct((k, 4, 256), jnp.float32)


def step_of(name, microbatch_size=1):
    return optax_bilevel.bilevel_value_and_grad(PROBLEMS[name][0], microbatch_size=microbatch_size)


@pytest.mark.parametrize("microbatch_size", [1, 2])
@pytest.mark.parametrize("name", PROBLEMS)
def test_memory_at_32_mini_batches_is_that_at_a_few(name, microbatch_size):
    step = step_of(name, microbatch_size)
    few, many = (temporary_bytes(step, *arguments(name, k)) for k in (4 * microbatch_size, 32))
    assert many <= 1.02 * few


@pytest.mark.parametrize("k", [16, 32])
@pytest.mark.parametrize("microbatch_size", [1, None])
def test_at_most_three_gradients_beside_the_networks_own_memory(microbatch_size, k):
    """One, the validation gradient, the sum; or, where the library chooses, as many factors."""
    params, batches = arguments("mlp", k)
    gradient = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    own = temporary_bytes(
        jax.grad(PROBLEMS["mlp"][0]), params, jax.ShapeDtypeStruct((4, 256), jnp.float32)
    )
    # A few hundred KiB of inner products and copies of the activations come on top.
    step = step_of("mlp", microbatch_size)
    assert temporary_bytes(step, params, batches) <= own + 3.2 * gradient


def test_the_stack_does_grow_so_the_measurement_can_fail():
    def stacked(params, batches):
        stack = jax.vmap(jax.grad(PROBLEMS["mlp"][0]), in_axes=(None, 0))(params, batches)
        rule = optax_bilevel.bilevel_reweight()
        return rule.update(stack, rule.init(params), params)[0]

    at_4, at_32 = (temporary_bytes(stacked, *arguments("mlp", k)) for k in (4, 32))
    assert at_32 > 4 * at_4
