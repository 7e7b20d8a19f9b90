import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import ResNetSmall
from tests.models import reference as ref
from tests.models.building import call, filled, initial, params_of


def batch(x, norm):
    return ref.batch_norm(x, norm["scale"], norm["bias"], 1e-5)


def group(x, norm):
    """Each image and each of 8 groups of channels by itself."""
    n, height, width, channels = x.shape
    groups = x.reshape(n, height, width, 8, channels // 8)
    axes = (1, 2, 4)
    mean, var = groups.mean(axes, keepdims=True), groups.var(axes, keepdims=True)
    one = ref.standardize(groups, mean, var, 1.0, 0.0, 1e-5).reshape(x.shape)
    return one * np.asarray(norm["scale"], np.float64) + np.asarray(norm["bias"], np.float64)


def forward(params, x, norm, stem_stride):
    """From the definition in the class's docstring."""
    x = ref.conv(x, params["conv"]["kernel"], stride=stem_stride, padding=1)
    x = ref.relu(norm(x, params["norm"]))
    for index, block in params["blocks"].items():
        stride = 1 if index == 0 else 2
        out = ref.conv(x, block["conv1"]["kernel"], stride=stride, padding=1)
        out = ref.conv(ref.relu(norm(out, block["norm1"])), block["conv2"]["kernel"], padding=1)
        if index > 0:
            x = ref.conv(x, block["shortcut"]["conv"]["kernel"], stride=stride, padding=0)
            x = norm(x, block["shortcut"]["norm"])
        x = ref.relu(x + norm(out, block["norm2"]))
    return ref.dense(x.mean((1, 2)), params["head"])


@pytest.mark.parametrize(
    ("norm", "shape", "stem_stride"),
    [
        ("batch", (8, 8, 1), 1),
        ("batch", (33, 20, 3), 2),
        ("group", (32, 9, 1), 1),
        ("group", (9, 40, 3), 2),
    ],
)
def test_matches_the_definition(norm, shape, stem_stride):
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    model = filled(lambda: ResNetSmall(10, shape, norm=norm, rngs=nnx.Rngs(0)))
    expected = forward(params_of(model), x, {"batch": batch, "group": group}[norm], stem_stride)
    np.testing.assert_allclose(call(model, x), expected, atol=1e-4 * np.abs(expected).max())


def test_constants():
    def build():
        return ResNetSmall(100, (8, 8, 3), rngs=nnx.Rngs(0))

    model = nnx.eval_shape(build)
    norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)]
    assert [(bn.momentum, bn.epsilon) for bn in norms] == [(0.9, 1e-5)] * 9
    kernels = initial(build, ("blocks", 2, "conv2", "kernel"), ("head", "kernel"))
    for kernel, fan_in in zip(kernels, (9 * 64, 64), strict=True):
        np.testing.assert_allclose(np.std(kernel), (2 / fan_in) ** 0.5, rtol=0.03)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_evaluation_looks_at_each_image_by_itself(norm):
    model = filled(lambda: ResNetSmall(5, (8, 8, 1), norm=norm, rngs=nnx.Rngs(0)))
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    trained = call(model, images)
    model.eval()
    np.testing.assert_allclose(call(model, images[:1]), call(model, images)[:1], atol=1e-5)
    # Group norm is the same in training.
    assert np.allclose(trained, call(model, images), atol=1e-5) == (norm == "group")


def test_batch_statistics_are_averaged_with_decay():
    model = filled(lambda: ResNetSmall(5, (8, 8, 1), rngs=nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype(np.float32)
    assert isinstance(model.norm, nnx.BatchNorm)
    before = np.array(model.norm.mean[...])
    call(model, x)
    seen = ref.conv(x, model.conv.kernel[...], padding=1).mean((0, 1, 2))
    np.testing.assert_allclose(model.norm.mean[...], 0.9 * before + 0.1 * seen, atol=1e-5)
    stats = nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
    assert len(stats) == 2 * 9


def test_group_norm_keeps_no_statistics():
    model = nnx.eval_shape(lambda: ResNetSmall(5, (8, 8, 1), norm="group", rngs=nnx.Rngs(0)))
    assert not jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.GroupNorm)]
    assert [(n.num_groups, n.epsilon) for n in norms] == [(8, 1e-5)] * 9


@pytest.mark.parametrize("size", [8, 28, 64, 96])
def test_sizes(size):
    def build_and_call():
        model = ResNetSmall(3, (size, size, 3), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        return model(jnp.zeros((2, size, size, 3), jnp.uint8))

    logits = nnx.eval_shape(build_and_call)
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)


def test_an_unknown_norm():
    with pytest.raises(ValueError, match='norm must be "batch" or "group", got \'layer\''):
        ResNetSmall(3, (8, 8, 1), norm="layer", rngs=nnx.Rngs(0))  # pyright: ignore[reportArgumentType]
