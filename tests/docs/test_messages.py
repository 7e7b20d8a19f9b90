"""Messages for mistakes that the pages mention in a word."""

import jax
import jax.numpy as jnp
import pytest
from jax import export

import optax_bilevel


def loss(w, batch):
    return jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


BATCHES = {"x": jnp.ones((4, 8, 3)), "y": jnp.ones((4, 8))}


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{"x": jnp.ones((8, 3)), "y": jnp.ones(8)}] * 4, "stack them along a new leading axis"),
        (jax.tree.map(lambda x: x[:1], BATCHES), "leave none to train on"),
        ({**BATCHES, "y": jnp.ones((3, 8))}, "expected a leading axis of k = 4 mini-batches"),
    ],
    ids=["a list", "one", "of different k"],
)
def test_mini_batches_that_do_not_fit(batches, message):
    with pytest.raises(ValueError, match=message):
        optax_bilevel.bilevel_value_and_grad(loss)(jnp.ones(3), batches)


def test_export_wants_a_number_of_mini_batches():
    (k,) = export.symbolic_shape("k")
    stack = jax.ShapeDtypeStruct((k, 3), jnp.float32)
    with pytest.raises(Exception, match="(?i)inconclusive|comparison"):
        export.export(jax.jit(optax_bilevel.bilevel_weights))(stack)
