"""Large leaves on one CPU device are read in chunks: the same products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_bilevel import _inner_products
from tests.optax_bilevel import oracle
from tests.optax_bilevel.problems import stack_of


@pytest.fixture
def chunks_of_16(monkeypatch):
    """k = 4 mini-batches, 16 entries of each at a time, as on a machine of one device."""
    monkeypatch.setattr(_inner_products, "_CHUNK", 64)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def products(leaves, num_validation=1):
    grouping = _inner_products.resolve_groups(leaves, None)

    @jax.jit
    def compute(leaves):
        return _inner_products.stack_products(leaves, grouping, num_validation, with_gram=False)

    text = compute.lower(leaves).as_text()
    return compute(leaves), "stablehlo.while" in text


@pytest.mark.usefixtures("chunks_of_16")
@pytest.mark.parametrize("num_validation", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
@pytest.mark.parametrize("shape", [(32,), (3, 4, 9)])
def test_same_products_as_in_float64(shape, dtype, num_validation):
    leaves = stack_of(0, [shape], 4, dtype)
    result, chunked = products([jnp.asarray(x) for x in leaves], num_validation)
    assert chunked
    g = oracle.widen(leaves[0]).reshape(4, -1)
    v = g[:num_validation].sum(0)
    reach = np.linalg.norm(v) * np.linalg.norm(g, axis=1)
    np.testing.assert_array_less(np.abs(result.dots[0] - np.real(g.conj() @ v)), 1e-6 * reach)
    np.testing.assert_allclose(result.sq_norms[0], np.linalg.norm(g, axis=1) ** 2, rtol=1e-6)
    np.testing.assert_allclose(result.validation_sq_norm[0], np.linalg.norm(v) ** 2, rtol=1e-6)


@pytest.mark.usefixtures("chunks_of_16")
@pytest.mark.parametrize("place", [3, 20, 34])
def test_nan_stays_with_its_mini_batch(place):
    leaf = stack_of(0, [(35,)], 4)[0]
    clean, _ = products([jnp.asarray(leaf)])
    leaf[2, place] = np.nan
    result, _ = products([jnp.asarray(leaf)])
    for name in ("dots", "sq_norms"):
        before, after = (np.asarray(getattr(x, name)[0]) for x in (clean, result))
        assert np.isnan(after[2])
        np.testing.assert_array_equal(np.delete(after, 2), np.delete(before, 2))


@pytest.mark.usefixtures("chunks_of_16")
def test_small_leaves_are_read_whole():
    _, chunked = products([jnp.ones((4, 31))])
    assert not chunked


def test_several_devices_divide_the_work_themselves(monkeypatch):
    monkeypatch.setattr(_inner_products, "_CHUNK", 64)
    assert jax.device_count() > 1
    _, chunked = products([jnp.ones((4, 64))])
    assert not chunked
