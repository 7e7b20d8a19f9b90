import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from models import local_response_normalization
from tests.models import reference


@pytest.mark.parametrize(("radius", "channels"), [(4, 64), (2, 7), (4, 3), (0, 5)])
def test_matches_the_formula(radius, channels):
    x = np.random.default_rng(0).normal(0, 3, (2, 3, 4, channels))
    constants = {"bias": 1.5, "alpha": 0.2, "beta": 0.75}
    ours = local_response_normalization(jnp.asarray(x, jnp.float32), radius=radius, **constants)
    np.testing.assert_allclose(ours, reference.lrn(x, radius, **constants), rtol=2e-6)


def test_one_value_by_hand():
    # Channel 0 sees itself and channel 1: 3 / (1 + 0.5 (9 + 16))^0.5.
    x = jnp.array([3.0, 4.0, 12.0])
    ours = local_response_normalization(x, radius=1, bias=1.0, alpha=0.5, beta=0.5)
    np.testing.assert_allclose(ours[0], 3 / 13.5**0.5, rtol=1e-6)


def test_gradient():
    x = jax.random.normal(jax.random.key(0), (2, 9))
    constants = {"radius": 2, "bias": 1.0, "alpha": 0.3, "beta": 0.75}
    check_grads(lambda x: local_response_normalization(x, **constants), (x,), 1, rtol=1e-2)


def test_half_precision_sums_in_float32():
    # The squares of 300 overflow float16.
    x = jnp.full((1, 8), 300.0, jnp.float16)
    ours = local_response_normalization(x, radius=4, bias=1.0, alpha=1e-4, beta=0.75)
    assert ours.dtype == jnp.float16
    exact = reference.lrn(np.full((1, 8), 300.0), 4, 1.0, 1e-4, 0.75)
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, rtol=1e-3)
