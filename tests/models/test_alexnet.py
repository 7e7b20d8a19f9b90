import numpy as np
from flax import nnx

from models import AlexNet
from tests.models import reference as ref
from tests.models.building import call, filled, initial, params_of

LRN = {"radius": 2, "bias": 1.0, "alpha": 1e-4 / 5, "beta": 0.75}


def build():
    return AlexNet(20, (227, 227, 3), rngs=nnx.Rngs(0))


def test_matches_the_definition():
    model = filled(build)
    model.eval()
    # Pixels of some hundreds, as Caffe feeds them: there the normalisation bites.
    image = np.random.default_rng(0).normal(0, 100, (1, 227, 227, 3)).astype(np.float32)
    params = params_of(model)
    grids = []
    x = image
    for name, pool, options in (
        ("conv1", True, {"stride": 4, "padding": 0}),
        ("conv2", True, {"padding": 2, "groups": 2}),
        ("conv3", False, {"padding": 1}),
        ("conv4", False, {"padding": 1, "groups": 2}),
        ("conv5", True, {"padding": 1, "groups": 2}),
    ):
        x = ref.relu(ref.conv(x, **params[name], **options))
        grids.append(x.shape[1:])
        if name in ("conv1", "conv2"):
            x = ref.lrn(x, **LRN)
        if pool:
            x = ref.max_pool(x, 3, 2, "VALID")
    assert grids == [(55, 55, 96), (27, 27, 256), (13, 13, 384), (13, 13, 384), (13, 13, 256)]
    x = x.reshape(1, -1)
    for name in ("fc6", "fc7"):
        x = ref.relu(ref.dense(x, params[name]))
    expected = ref.dense(x, params["head"])
    np.testing.assert_allclose(call(model, image), expected, atol=1e-4 * np.abs(expected).max())


def test_initial_weights():
    layers = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "head")
    kernels = {"conv1": 0.01, "conv4": 0.01, "fc7": 0.005, "head": 0.01}
    paths = [(name, "bias") for name in layers] + [(name, "kernel") for name in kernels]
    values = initial(build, *paths)
    constants = [0.0, 0.1, 0.0, 0.1, 0.1, 0.1, 0.1, 0.0]
    for bias, constant in zip(values[:8], constants, strict=True):
        np.testing.assert_array_equal(bias, np.float32(constant))
    for kernel, stddev in zip(values[8:], kernels.values(), strict=True):
        np.testing.assert_allclose(np.std(kernel), stddev, rtol=0.02)
