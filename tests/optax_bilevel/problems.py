"""Gradients and losses that several tests share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def slow(*values):
    """Parameters of a case that is left out of the default run."""
    return pytest.param(*values, marks=pytest.mark.slow)


def stack_of(seed, shapes, k, dtype=jnp.float32, scale=1.0):
    """A list of NumPy leaves [k, *shape], normally distributed around a direction all share."""
    rng = np.random.default_rng(seed)

    def draw(shape):
        x = rng.normal(size=shape) + 0.5 * rng.normal(size=shape[1:])
        if jnp.issubdtype(dtype, jnp.complexfloating):
            x = x + 1j * rng.normal(size=shape)
        return np.asarray(x * scale, dtype)

    return [draw((k, *shape)) for shape in shapes]


def params_of(seed=0):
    """One layer's parameters: odd sizes, a scalar, an array of one entry."""
    rng = np.random.default_rng(seed)
    return {
        "gain": jnp.float32(0.7),
        "layer": {
            "bias": jnp.asarray(rng.normal(size=3), jnp.float32),
            "kernel": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
        },
        "shift": jnp.full((1,), 0.1, jnp.float32),
    }


def batches_of(k, b=4, seed=1):
    """k mini-batches of b examples, leaves [k, b, ...]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(k, b, 5))
    y = np.tanh(x @ rng.normal(size=(5, 3))) + 0.1 * rng.normal(size=(k, b, 3))
    return {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}


def outputs(params, x):
    layer = params["layer"]
    kernel = layer["kernel"].astype(x.dtype)  # may be bfloat16
    return params["gain"] * jnp.tanh(x @ kernel + layer["bias"][None]) + params["shift"][0]


def loss(params, batch):
    """Mean squared error of one layer."""
    return jnp.mean(jnp.square(outputs(params, batch["x"]) - batch["y"]))


def stacked_gradients(params, batches, loss_fn=loss):
    return jax.jit(jax.vmap(jax.grad(loss_fn), in_axes=(None, 0)))(params, batches)


def distance(a, b):
    """|a - b| / |b| over all leaves, in float64 (complex128); |a| where b is zero."""
    flat_a, flat_b = (
        np.concatenate([np.asarray(x, np.complex128).ravel() for x in jax.tree.leaves(tree)])
        for tree in (a, b)
    )
    return np.linalg.norm(flat_a - flat_b) / (np.linalg.norm(flat_b) or 1.0)


def assert_close(a, b, tolerance=1e-6):
    """The two trees agree in structure, shapes and dtypes, and to `tolerance`, norm-wise."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
    assert distance(a, b) <= tolerance


def assert_nothing(tree):
    """All zeros, none of them NaN."""
    for x in jax.tree.leaves(tree):
        np.testing.assert_array_equal(x, np.zeros(x.shape))
