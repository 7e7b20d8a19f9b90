import jax
import optax
import pytest
from flax import nnx

import models


def params_of(name, input_shape):
    model = nnx.eval_shape(
        lambda: models.create(name, num_classes=10, input_shape=input_shape, rngs=nnx.Rngs(0))
    )
    return nnx.state(model, nnx.Param)


def flat(state):
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def values(state):
    return {path: leaf.get_value() for path, leaf in flat(state).items()}


def test_decay_mask_marks_kernels_alone():
    marked = {
        p for p, m in values(models.decay_mask(params_of("cifarnet", (28, 28, 3)))).items() if m
    }
    assert marked == {"conv1/kernel", "conv2/kernel", "fc3/kernel", "fc4/kernel", "head/kernel"}


@pytest.mark.parametrize(
    ("name", "input_shape", "kernels", "leaves"),
    [
        # 8 inception modules of two convolutions, 2 downsamplings and the stem, each with a shift,
        # and a linear layer.
        ("inception", (29, 29, 3), 8 * 2 + 2 + 1 + 1, 2 * 19 + 2),
        # Stem, 16 convolutions, 3 shortcuts, linear; 17 batch norms with scale and shift, a bias.
        ("preact_resnet18", (32, 32, 3), 21, 21 + 34 + 1),
        ("resnet50", (224, 224, 3), 54, 54 + 2 * 53 + 1),
        # Stem, 6 convolutions, 2 shortcuts, linear; 9 norms.
        ("resnet_small", (8, 8, 1), 10, 10 + 18 + 1),
        ("resnet_small_gn", (8, 8, 1), 10, 10 + 18 + 1),
    ],
)
def test_decay_mask_leaves_norms_out(name, input_shape, kernels, leaves):
    params = params_of(name, input_shape)
    mask = values(models.decay_mask(params))
    assert sum(mask.values()) == kernels
    assert len(mask) == leaves
    for path, leaf in flat(params).items():
        assert mask[path] == (len(leaf.shape) > 1)


def test_masked_weight_decay():
    model = models.MLP(3, (4,), hidden=(5,), rngs=nnx.Rngs(0))
    params = jax.tree.map(lambda p: p + 1.0, nnx.state(model, nnx.Param))
    decay = optax.add_decayed_weights(0.1, mask=models.decay_mask)
    zeros = jax.tree.map(lambda p: 0 * p, params)
    updates, _ = decay.update(zeros, decay.init(params), params)
    for path, update in flat(updates).items():
        expected = 0.1 * flat(params)[path][...] if path.endswith("kernel") else 0.0
        assert (update[...] == expected).all(), path
    assert (flat(updates)["head/kernel"][...] != 0).any()


@pytest.mark.parametrize("plain", [False, True])
def test_layer_labels(plain):
    params = params_of("cifarnet", (28, 28, 3))
    if plain:
        params = nnx.to_pure_dict(params)
    labels = models.layer_labels(params)
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    layers = ("conv1", "conv2", "fc3", "fc4", "head")
    # Bias before kernel, layers in order.
    assert jax.tree.leaves(labels) == [layer for layer in layers for _ in range(2)]


def test_norm_belongs_to_its_convolution():
    labels = values(models.layer_labels(params_of("inception", (29, 29, 3))))
    assert labels["stem/conv/kernel"] == labels["stem/bn/bias"] == "stem/conv"
    assert labels["blocks/2/threes/bn/bias"] == "blocks/2/threes/conv"
    assert len(set(labels.values())) == 20

    labels = values(models.layer_labels(params_of("preact_resnet18", (32, 32, 3))))
    assert labels["blocks/3/bn2/scale"] == labels["blocks/3/conv2/kernel"] == "blocks/3/conv2"
    assert labels["blocks/2/shortcut/kernel"] == "blocks/2/shortcut"
    assert len(set(labels.values())) == 21

    labels = values(models.layer_labels(params_of("resnet50", (224, 224, 3))))
    assert labels["layer1/0/downsample/bn/bias"] == "layer1/0/downsample/conv"
    assert len(set(labels.values())) == 54

    labels = values(models.layer_labels(params_of("resnet_small_gn", (8, 8, 1))))
    assert labels["norm/scale"] == labels["conv/kernel"] == "conv"
    assert labels["blocks/1/norm2/bias"] == "blocks/1/conv2"
    assert labels["blocks/1/shortcut/norm/bias"] == "blocks/1/shortcut/conv"
    assert len(set(labels.values())) == 10


def test_labels_and_mask_of_stacked_gradients_are_those_of_the_parameters():
    params = nnx.state(models.MLP(3, (4,), hidden=(5,), rngs=nnx.Rngs(0)), nnx.Param)
    stacked = jax.tree.map(lambda p: jax.numpy.stack([p, p]), params)
    assert jax.tree.leaves(models.layer_labels(stacked)) == ["head", "head", "hidden/0", "hidden/0"]
    assert jax.tree.leaves(models.decay_mask(stacked)) == [False, True, False, True]


def test_labels_drive_optax_partition():
    params = nnx.state(models.MLP(3, (4,), hidden=(5,), rngs=nnx.Rngs(0)), nnx.Param)
    tx = optax.partition(
        {"head": optax.scale(2.0), "hidden/0": optax.scale(3.0)}, models.layer_labels
    )
    ones = jax.tree.map(jax.numpy.ones_like, params)
    updates, _ = tx.update(ones, tx.init(params), params)
    assert {path: set(leaf[...].ravel().tolist()) for path, leaf in flat(updates).items()} == {
        "head/bias": {2.0},
        "head/kernel": {2.0},
        "hidden/0/bias": {3.0},
        "hidden/0/kernel": {3.0},
    }


def test_parameter_count():
    assert models.parameter_count({"a": jax.numpy.zeros((2, 3)), "b": [jax.numpy.zeros(())]}) == 7
