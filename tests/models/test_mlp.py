import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import MLP
from tests.models import reference as ref
from tests.models.building import call, filled, initial, params_of


@pytest.mark.parametrize("hidden", [(), (16,), (16, 7, 9)])
def test_matches_the_definition(hidden):
    x = np.random.default_rng(0).normal(size=(3, 4, 5, 2)).astype(np.float32)
    model = filled(lambda: MLP(10, (4, 5, 2), hidden=hidden, rngs=nnx.Rngs(0)))
    params = params_of(model)
    out = x.reshape(3, 40)
    for layer in range(len(hidden)):
        out = ref.relu(ref.dense(out, params["hidden"][layer]))
    np.testing.assert_allclose(call(model, x), ref.dense(out, params["head"]), atol=1e-5)


def test_initial_weights():
    kernel, bias = initial(
        lambda: MLP(10, (784,), rngs=nnx.Rngs(0)), ("hidden", 0, "kernel"), ("hidden", 0, "bias")
    )
    np.testing.assert_allclose(np.std(kernel), (2 / (784 + 512)) ** 0.5, rtol=0.01)
    # Not truncated: of 400,000 values some lie beyond four standard deviations.
    assert np.abs(kernel).max() > 4 * (2 / (784 + 512)) ** 0.5
    assert not bias.any()


def test_dropout_after_every_hidden_layer():
    model = nnx.eval_shape(lambda: MLP(8, (8,), hidden=(8, 8), dropout_rate=0.5, rngs=nnx.Rngs(0)))
    # With identities for layers the two masks multiply: a quarter is left, four times as big.
    identity = {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}
    for layer in (*model.hidden, model.head):
        nnx.update(layer, identity)
    out = call(model, jnp.ones((4096, 8)), jax.random.key(3))
    assert set(np.unique(out)) == {0.0, 4.0}
    np.testing.assert_allclose((out > 0).mean(), 0.25, atol=0.02)


def test_width_below_one():
    with pytest.raises(ValueError, match=r"hidden widths must be at least 1, got \(16, 0\)"):
        MLP(10, (4,), hidden=(16, 0), rngs=nnx.Rngs(0))
