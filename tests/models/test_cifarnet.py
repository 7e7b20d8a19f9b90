import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import CifarNet
from tests.models import reference as ref
from tests.models.building import call, filled, initial, params_of

LRN = {"radius": 4, "bias": 1.0, "alpha": 0.001 / 9, "beta": 0.75}


def forward(params, x, variant):
    """From the definition in the class's docstring; `params` as plain dicts."""
    for name in ("conv1", "conv2"):
        x = ref.relu(ref.conv(x, **params[name]))
        if variant == "zhang":
            x = ref.lrn(ref.max_pool(x, 3, 2, "SAME"), **LRN)
        elif name == "conv1":
            x = ref.lrn(ref.max_pool(x, 2, 2, "VALID"), **LRN)
        else:
            x = ref.max_pool(ref.lrn(x, **LRN), 2, 2, "VALID")
    x = x.reshape(len(x), -1)
    x = ref.relu(ref.dense(x, params["fc3"]))
    x = ref.relu(ref.dense(x, params["fc4"]))
    return ref.dense(x, params["head"])


@pytest.mark.parametrize(("variant", "size"), [("zhang", 28), ("slim", 29), ("zhang", 9)])
def test_matches_the_definition(variant, size):
    # Large inputs, so that the normalisation is not next to the identity.
    x = np.random.default_rng(0).normal(0, 30, (2, size, size, 3)).astype(np.float32)
    model = filled(lambda: CifarNet(10, (size, size, 3), variant=variant, rngs=nnx.Rngs(0)))
    model.eval()
    expected = forward(params_of(model), x, variant)
    np.testing.assert_allclose(call(model, x), expected, atol=2e-5 * np.abs(expected).max())


def test_initial_weights():
    layers = ("conv1", "conv2", "fc3", "fc4", "head")
    values = initial(
        lambda: CifarNet(100, (28, 28, 3), rngs=nnx.Rngs(0)),
        *[(layer, leaf) for layer in layers for leaf in ("kernel", "bias")],
    )
    # A normal cut at two standard deviations keeps 0.8796 of its deviation.
    for kernel, bias, stddev, constant, tolerance in (
        (*values[0:2], 0.05, 0.0, 0.05),
        (*values[2:4], 0.05, 0.0, 0.01),
        (*values[4:6], 0.04, 0.1, 0.01),
        (*values[6:8], 0.04, 0.1, 0.02),
        (*values[8:10], 1 / 192, 0.0, 0.03),
    ):
        assert 1.9 * stddev < np.abs(kernel).max() <= 2 * stddev
        np.testing.assert_allclose(np.std(kernel), 0.8796 * stddev, rtol=tolerance)
        np.testing.assert_array_equal(bias, np.float32(constant))


def test_unknown_variant():
    with pytest.raises(ValueError, match="variants 'zhang' and 'slim', got 'keras'"):
        CifarNet(10, (28, 28, 3), variant="keras", rngs=nnx.Rngs(0))  # pyright: ignore[reportArgumentType]


def test_dropout_follows_the_key():
    model = filled(lambda: CifarNet(10, (8, 8, 1), rngs=nnx.Rngs(0)))
    kept = model.dropout(jnp.ones((64, 384)), rngs=nnx.Rngs(0))
    assert set(np.unique(kept)) == {0.0, 2.0}
    np.testing.assert_allclose((kept > 0).mean(), 0.5, atol=0.02)

    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    masked = nnx.jit(lambda model, key: model(images, rngs=nnx.Rngs(key)))
    one, same, other = (masked(model, jax.random.key(seed)) for seed in (1, 1, 2))
    assert (one == same).all()
    assert not (one == other).all()
    with pytest.raises(ValueError, match="no `rngs` argument was provided to Dropout"):
        model(images)
    model.eval()
    assert (call(model, images) == masked(model, jax.random.key(1))).all()


def test_images_of_another_shape():
    model = nnx.eval_shape(lambda: CifarNet(10, (28, 28, 1), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"expected x of shape \[batch, 28, 28, 1\], got \[2, 32"):
        model(jnp.zeros((2, 32, 32, 1)))
