import jax
import numpy as np
import pytest
from flax import nnx

from models import SmallInception
from tests.models import reference as ref
from tests.models.building import call, filled, initial, params_of


def forward(params, x, stem_padding):
    """From the definition in the class's docstring, with the batch's own statistics."""

    def unit(x, unit, stride=1, padding: ref.Padding = "SAME"):
        x = ref.conv(x, unit["conv"]["kernel"], stride=stride, padding=padding)
        return ref.relu(ref.batch_norm(x, 1.0, unit["bn"]["bias"], 1e-3))

    grids = []
    x = unit(x, params["stem"], padding=stem_padding)
    for block in params["blocks"].values():
        if "ones" in block:
            sides = [unit(x, block["ones"]), unit(x, block["threes"])]
        else:
            grids.append(x.shape[1])
            sides = [unit(x, block["threes"], stride=2), ref.max_pool(x, 3, 2, "SAME")]
        x = np.concatenate(sides, axis=-1)
    assert [*grids, x.shape[1]] == [27 if stem_padding == "VALID" else 28, 14, 7]
    return ref.dense(x.mean((1, 2)), params["head"])


@pytest.mark.parametrize(("size", "stem_padding"), [(29, "VALID"), (28, "SAME")])
def test_matches_the_definition(size, stem_padding):
    x = np.random.default_rng(0).normal(size=(3, size, size, 3)).astype(np.float32)
    model = filled(lambda: SmallInception(10, (size, size, 3), dropout_rate=0.0, rngs=nnx.Rngs(0)))
    expected = forward(params_of(model), x, stem_padding)
    np.testing.assert_allclose(call(model, x), expected, atol=1e-4)


def test_batch_statistics():
    model = filled(lambda: SmallInception(10, (28, 28, 1), rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (4, 28, 28, 1))
    stem = model.stem
    convolved = np.asarray(stem.conv(x), np.float64)
    mean, var = (np.asarray(s) for s in (stem.bn.mean[...], stem.bn.var[...]))
    stem(x)
    mean = 0.975 * mean + 0.025 * convolved.mean((0, 1, 2))
    var = 0.975 * var + 0.025 * convolved.var((0, 1, 2))
    np.testing.assert_allclose(stem.bn.mean[...], mean, atol=1e-6)
    np.testing.assert_allclose(stem.bn.var[...], var, rtol=1e-5)

    model.eval()
    assert stem.bn.bias is not None
    standard = ref.standardize(convolved, mean, var, 1.0, stem.bn.bias[...], 1e-3)
    np.testing.assert_allclose(stem(x), ref.relu(standard), atol=1e-5)
    np.testing.assert_allclose(stem.bn.mean[...], mean, atol=1e-6)


def test_initial_weights():
    kernel, head, bias, shift = initial(
        lambda: SmallInception(10, (29, 29, 3), rngs=nnx.Rngs(0)),
        ("blocks", 8, "threes", "conv", "kernel"),
        ("head", "kernel"),
        ("head", "bias"),
        ("stem", "bn", "bias"),
    )
    np.testing.assert_allclose(np.std(kernel), (2 / kernel[..., 0].size) ** 0.5, rtol=0.01)
    # Truncated, so nothing beyond two deviations of the normal it is cut from.
    assert np.abs(kernel).max() < 2.3 * (2 / kernel[..., 0].size) ** 0.5
    np.testing.assert_allclose(np.std(head), (2 / 336) ** 0.5, rtol=0.05)
    assert not bias.any()
    assert not shift.any()
