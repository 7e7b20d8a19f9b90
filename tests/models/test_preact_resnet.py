import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import PreActResNet18
from tests.models import reference as ref
from tests.models.building import call, filled, initial, params_of


def forward(params, x):
    """From the definition in the class's docstring, with the batch's own statistics."""

    def activated(x, bn):
        return ref.relu(ref.batch_norm(x, bn["scale"], bn["bias"], 1e-5))

    x = activated(ref.conv(x, params["conv"]["kernel"], padding=1), params["bn"])
    for index, block in params["blocks"].items():
        stride = 2 if index in (2, 4, 6) else 1
        inner = activated(x, block["bn1"])
        if index in (2, 4, 6):
            x = ref.conv(inner, block["shortcut"]["kernel"], stride=2, padding=0)
        out = ref.conv(inner, block["conv1"]["kernel"], stride=stride, padding=1)
        x = x + ref.conv(activated(out, block["bn2"]), block["conv2"]["kernel"], padding=1)
    return ref.dense(x.mean((1, 2)), params["head"])


def test_matches_the_definition():
    x = np.random.default_rng(0).normal(size=(3, 16, 12, 3)).astype(np.float32)
    model = filled(lambda: PreActResNet18(10, (16, 12, 3), rngs=nnx.Rngs(0)))
    expected = forward(params_of(model), x)
    np.testing.assert_allclose(call(model, x), expected, atol=1e-4 * np.abs(expected).max())


def test_constants():
    def build():
        return PreActResNet18(100, (8, 8, 3), rngs=nnx.Rngs(0))

    model = nnx.eval_shape(build)
    norms = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm)]
    assert {(bn.momentum, bn.epsilon) for bn in norms} == {(0.9, 1e-5)}
    assert len(norms) == 17
    # Uniform within ±1/sqrt(fan in), its deviation the bound over sqrt(3).
    kernels = initial(build, ("blocks", 4, "conv2", "kernel"), ("head", "kernel"))
    for kernel, fan_in in zip(kernels, (9 * 256, 512), strict=True):
        bound = fan_in**-0.5
        assert 0.99 * bound < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(np.std(kernel), bound / 3**0.5, rtol=0.01)


def test_dropout_lies_between_the_convolutions_of_a_block():
    model = filled(lambda: PreActResNet18(10, (8, 8, 3), dropout_rate=0.5, rngs=nnx.Rngs(0)))
    seen = []
    block = model.blocks[0]
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 64))
    out = block(x, lambda h: seen.append(h) or jnp.zeros_like(h))
    assert (out == x).all()
    expected = nnx.relu(block.bn2(block.conv1(nnx.relu(block.bn1(x)))))
    np.testing.assert_allclose(seen[0], expected, atol=1e-6)

    graphdef, state = nnx.split(model)

    def network(key):
        rngs = None if key is None else nnx.Rngs(key)
        return nnx.merge(graphdef, state, copy=True)(jnp.zeros((2, 8, 8, 3)), rngs=rngs)

    with pytest.raises(ValueError, match="no `rngs` argument was provided to Dropout"):
        jax.eval_shape(lambda: network(None))
    assert jax.eval_shape(network, jax.random.key(0)).shape == (2, 10)
