import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models import ResNet50, load_pretrained
from tests.models import reference as ref
from tests.models.building import call, initial

STAGES = {"layer1": (64, 3), "layer2": (128, 4), "layer3": (256, 6), "layer4": (512, 3)}


def state_dict(num_classes=1000):
    """Random weights under the names, and in the layout, of torchvision's resnet50().state_dict().

    The last batch norm of each block is scaled down, as training does, so that the sum over
    blocks does not grow with depth.
    """
    draw = np.random.default_rng(0)
    tensors = {}

    def conv(name, features, features_in, size):
        stddev = (2 / (features_in * size * size)) ** 0.5
        tensors[f"{name}.weight"] = draw.normal(0, stddev, (features, features_in, size, size))

    def batch_norm(name, features, scale=1.0):
        tensors[f"{name}.weight"] = scale * draw.uniform(0.5, 1.5, features)
        tensors[f"{name}.bias"] = draw.normal(0, 0.2, features)
        tensors[f"{name}.running_mean"] = draw.normal(0, 0.2, features)
        tensors[f"{name}.running_var"] = draw.uniform(0.5, 1.5, features)
        tensors[f"{name}.num_batches_tracked"] = np.array(7)

    conv("conv1", 64, 3, 7)
    batch_norm("bn1", 64)
    features_in = 64
    for stage, (width, blocks) in STAGES.items():
        for block in range(blocks):
            name = f"{stage}.{block}"
            conv(f"{name}.conv1", width, features_in, 1)
            batch_norm(f"{name}.bn1", width)
            conv(f"{name}.conv2", width, width, 3)
            batch_norm(f"{name}.bn2", width)
            conv(f"{name}.conv3", 4 * width, width, 1)
            batch_norm(f"{name}.bn3", 4 * width, 0.3)
            if block == 0:
                conv(f"{name}.downsample.0", 4 * width, features_in, 1)
                batch_norm(f"{name}.downsample.1", 4 * width)
            features_in = 4 * width
    tensors["fc.weight"] = draw.normal(0, 2048**-0.5, (num_classes, 2048))
    tensors["fc.bias"] = draw.normal(0, 0.2, num_classes)
    return {
        name: tensor.astype(np.int64 if name.endswith("tracked") else np.float32)
        for name, tensor in tensors.items()
    }


def features(tensors, x):
    """torchvision's ResNet-50 v1.5 up to the mean pool, in evaluation mode, in float64."""

    def conv(x, name, **options):
        return ref.conv(x, tensors[f"{name}.weight"].transpose(2, 3, 1, 0), **options)

    def batch_norm(x, name):
        moments = tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"]
        scale, shift = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return ref.standardize(x, *moments, scale, shift, 1e-5)

    x = ref.relu(batch_norm(conv(x, "conv1", stride=2, padding=3), "bn1"))
    x = ref.max_pool(x, 3, 2, 1)
    for stage, (_, blocks) in STAGES.items():
        for block in range(blocks):
            name = f"{stage}.{block}"
            stride = 2 if block == 0 and stage != "layer1" else 1
            shortcut = x
            if block == 0:
                shortcut = conv(x, f"{name}.downsample.0", stride=stride, padding=0)
                shortcut = batch_norm(shortcut, f"{name}.downsample.1")
            x = ref.relu(batch_norm(conv(x, f"{name}.conv1", padding=0), f"{name}.bn1"))
            x = conv(x, f"{name}.conv2", stride=stride, padding=1)
            x = ref.relu(batch_norm(x, f"{name}.bn2"))
            x = batch_norm(conv(x, f"{name}.conv3", padding=0), f"{name}.bn3")
            x = ref.relu(x + shortcut)
    return x.mean((1, 2))


@pytest.fixture(scope="module")
def tensors():
    return state_dict()


@pytest.fixture(scope="module")
def path(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet50.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32)


def abstract(num_classes=1000, input_shape=(64, 64, 3)):
    # Every weight is to come from the file: one that does not stays abstract and fails.
    model = nnx.eval_shape(lambda: ResNet50(num_classes, input_shape, rngs=nnx.Rngs(0)))
    model.eval()
    return model


def test_loaded_network_computes_the_original_logits(tensors, path, images):
    model = abstract()
    load_pretrained(model, path)
    expected = features(tensors, images) @ tensors["fc.weight"].T + tensors["fc.bias"]
    assert 0.5 < expected.std() < 10
    np.testing.assert_allclose(call(model, images), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(
    not importlib.util.find_spec("torchvision"), reason="torch and torchvision are not installed"
)
def test_loaded_network_computes_what_torchvision_computes(tensors, path, images):
    import torch  # pyright: ignore[reportMissingImports]
    import torchvision  # pyright: ignore[reportMissingImports]

    original = torchvision.models.resnet50()
    original.load_state_dict({name: torch.from_numpy(t) for name, t in tensors.items()})
    original.eval()
    with torch.no_grad():
        expected = original(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    model = abstract()
    load_pretrained(model, path)
    np.testing.assert_allclose(call(model, images), expected, rtol=0, atol=1e-4)


def test_new_head_on_loaded_features(tensors, path):
    model = abstract(14)
    model.head = nnx.Linear(2048, 14, rngs=nnx.Rngs(3))
    kernel = np.array(model.head.kernel[...])
    load_pretrained(model, path, replace_head=True)
    np.testing.assert_array_equal(model.head.kernel[...], kernel)
    original = tensors["layer1.0.downsample.0.weight"]
    np.testing.assert_array_equal(
        model.layer1[0].downsample.conv.kernel[0, 0], original[:, :, 0, 0].T
    )
    # Nothing but arrays is left, so everything else came from the file.
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    assert {type(leaf) for leaf in jax.tree.leaves(state)} == {type(jnp.zeros(()))}


def test_half_precision_file(tensors, tmp_path):
    half = {n: t.astype(np.float16) if t.dtype == np.float32 else t for n, t in tensors.items()}
    safetensors.numpy.save_file(half, tmp_path / "half.safetensors")
    model = abstract()
    load_pretrained(model, tmp_path / "half.safetensors")
    loaded = model.layer4[2].conv3.kernel[...]
    assert loaded.dtype == jnp.float32
    original = tensors["layer4.2.conv3.weight"].astype(np.float16).transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(loaded, original.astype(np.float32))


def test_every_wrong_tensor_is_named_and_nothing_is_written(tensors, tmp_path):
    wrong = dict(tensors)
    del wrong["layer3.5.bn2.running_var"]
    wrong["layer2.0.downsample.0.weight"] = np.zeros((512, 256, 3, 3), np.float32)
    wrong["layer1.0.conv4.weight"] = np.zeros((1,), np.float32)
    wrong["bn9.num_batches_tracked"] = np.array(7)
    safetensors.numpy.save_file(wrong, tmp_path / "wrong.safetensors")
    model = abstract()
    with pytest.raises(ValueError, match=r"wrong\.safetensors' does not hold this ResNet-50") as e:
        load_pretrained(model, tmp_path / "wrong.safetensors")
    assert str(e.value).splitlines()[1:] == [
        "  missing: layer3.5.bn2.running_var",
        "  unexpected: bn9.num_batches_tracked",
        "  unexpected: layer1.0.conv4.weight",
        "  misshapen: layer2.0.downsample.0.weight, expected (512, 256, 1, 1), "
        "got (512, 256, 3, 3)",
    ]
    assert isinstance(model.conv1.kernel.get_value(), jax.ShapeDtypeStruct)


def test_other_classes_need_replace_head(path):
    with pytest.raises(ValueError, match="does not hold") as e:
        load_pretrained(abstract(14), path)
    assert sorted(str(e.value).splitlines()[1:]) == [
        "  misshapen: fc.bias, expected (14,), got (1000,); "
        "replace_head=True keeps the network's own last layer",
        "  misshapen: fc.weight, expected (14, 2048), got (1000, 2048); "
        "replace_head=True keeps the network's own last layer",
    ]


def test_file_without_counters_and_head(tensors, tmp_path):
    kept = {n: t for n, t in tensors.items() if "tracked" not in n and not n.startswith("fc.")}
    safetensors.numpy.save_file(kept, tmp_path / "features.safetensors")
    load_pretrained(abstract(14), tmp_path / "features.safetensors", replace_head=True)
    with pytest.raises(ValueError, match=r"missing: fc\.bias") as e:
        load_pretrained(abstract(), tmp_path / "features.safetensors")
    assert str(e.value).count("missing") == 2


def test_not_a_safetensors_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.safetensors"):
        load_pretrained(abstract(), tmp_path / "absent.safetensors")
    (tmp_path / "resnet50.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match=r"is not a safetensors file .*torch\.save_file"):
        load_pretrained(abstract(), tmp_path / "resnet50.pth")


def test_constants():
    norms = [m for _, m in nnx.iter_modules(abstract()) if isinstance(m, nnx.BatchNorm)]
    assert {(bn.momentum, bn.epsilon) for bn in norms} == {(0.9, 1e-5)}
    assert len(norms) == 53
    conv, head, bias = initial(
        lambda: ResNet50(14, (64, 64, 3), rngs=nnx.Rngs(0)),
        ("layer2", 0, "conv2", "kernel"),
        ("head", "kernel"),
        ("head", "bias"),
    )
    np.testing.assert_allclose(np.std(conv), (2 / (9 * 128)) ** 0.5, rtol=0.01)
    np.testing.assert_allclose(np.abs(head).max(), 2048**-0.5, rtol=0.01)
    assert not bias.any()
