"""Large leaves on one CPU device are read in pieces: the same products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_bilevel import _inner_products
from tests.optax_bilevel import oracle
from tests.optax_bilevel.problems import stack_of


@pytest.fixture
def chunks_of_16(monkeypatch):
    """k = 4 mini-batches, 16 entries of each at a time, 2 side by side, as on one device."""
    small = {"_CHUNK": 64, "_SUMS": 8, "_STREAMS": 2, "_LINES": 4, "_LINE": 1, "_MOST_SLOTS": 2}
    for name, value in small.items():
        monkeypatch.setattr(_inner_products, name, value)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def products(leaves, num_validation=1, with_gram=False, past=None, traced=None):
    grouping = _inner_products.resolve_groups(leaves, None)

    @jax.jit
    def compute(leaves, past, traced):
        slots = num_validation if traced is None else traced
        return _inner_products.stack_products(
            leaves, grouping, slots, with_gram=with_gram, past=past
        )

    text = compute.lower(leaves, past, traced).as_text()
    return compute(leaves, past, traced), "stablehlo.while" in text


@pytest.mark.usefixtures("chunks_of_16")
@pytest.mark.parametrize("validation", [1, 2, 3, "traced 1", "traced 2", "past"])
@pytest.mark.parametrize("with_gram", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
@pytest.mark.parametrize("shape", [(61,), (3, 4, 9)])
def test_same_products_as_in_float64(shape, dtype, with_gram, validation):
    leaves = stack_of(0, [shape], 4, dtype)
    g = oracle.widen(leaves[0]).reshape(4, -1)
    if validation == "past":
        wide = _inner_products.accumulation_dtype(leaves[0].dtype)
        past = [oracle.widen(stack_of(1, [shape], 1, dtype)[0])[0].astype(wide)]
        v, slots = past[0].reshape(-1), 0
    else:
        slots = int(str(validation)[-1])
        past, v = None, g[:slots].sum(0)
    traced = jnp.int32(slots) if str(validation).startswith("traced") else None
    result, chunked = products([jnp.asarray(x) for x in leaves], slots, with_gram, past, traced)
    assert chunked
    norms = np.linalg.norm(g, axis=1)
    reach = np.linalg.norm(v) * norms
    np.testing.assert_array_less(np.abs(result.dots[0] - np.real(g.conj() @ v)), 1e-6 * reach)
    np.testing.assert_allclose(result.sq_norms[0], norms**2, rtol=1e-6)
    np.testing.assert_allclose(result.validation_sq_norm[0], np.linalg.norm(v) ** 2, rtol=1e-6)
    if with_gram:
        error = np.abs(result.gram[0] - np.real(g.conj() @ g.T))
        np.testing.assert_array_less(error, 1e-6 * np.outer(norms, norms))
    else:
        assert result.gram is None


@pytest.mark.usefixtures("chunks_of_16")
@pytest.mark.parametrize("with_gram", [False, True])
def test_bfloat16_is_never_written_out_in_float32(with_gram):
    leaves = [jnp.zeros((4, 1 << 16), jnp.bfloat16)]
    grouping = _inner_products.resolve_groups(leaves, None)

    def compute(leaves):
        return _inner_products.stack_products(leaves, grouping, 1, with_gram=with_gram)

    memory = jax.jit(compute).lower(leaves).compile().memory_analysis()
    assert memory.temp_size_in_bytes < leaves[0].nbytes / 10


@pytest.mark.parametrize("k", [4, 15, 16, 40])
def test_bfloat16_is_not_written_out_for_the_sum(k):
    stack = jnp.zeros((k, 1 << 14), jnp.bfloat16)
    grouping = _inner_products.resolve_groups(stack, None)

    def compute(stack, weights):
        return _inner_products.weighted_sum(stack, weights, grouping)

    memory = jax.jit(compute).lower(stack, jnp.ones((1, k))).compile().memory_analysis()
    assert memory.temp_size_in_bytes < stack.nbytes / 10


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


def test_more_mini_batches_than_columns(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    g = np.random.default_rng(0).normal(size=(20_000, 150)).astype(np.float32)
    assert g.size > 2 * _inner_products._CHUNK
    result, _ = products([jnp.asarray(g)])
    np.testing.assert_allclose(result.sq_norms[0], np.sum(np.square(g, dtype=float), 1), rtol=1e-5)


@pytest.mark.usefixtures("chunks_of_16")
def test_small_leaves_are_read_whole():
    _, chunked = products([jnp.ones((4, 31))])
    assert not chunked


def test_several_devices_divide_the_work_themselves(monkeypatch):
    monkeypatch.setattr(_inner_products, "_CHUNK", 64)
    assert jax.device_count() > 1
    _, chunked = products([jnp.ones((4, 64))])
    assert not chunked
