import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import models

IMAGES = {
    "alexnet": (227, 227, 3),
    "cifarnet": (28, 28, 3),
    "cifarnet_slim": (32, 32, 3),
    "inception": (29, 29, 3),
    "mlp": (8, 8, 1),
    "mlp_1x512": (28, 28, 3),
    "mlp_3x512": (28, 28, 3),
    "preact_resnet18": (32, 32, 3),
    "resnet50": (64, 64, 3),
    "resnet_small": (64, 64, 3),
    "resnet_small_gn": (28, 28, 3),
}

_COMPUTING = nnx.Conv | nnx.Linear | nnx.BatchNorm | nnx.GroupNorm


def abstract(name, num_classes, input_shape, **options):
    return nnx.eval_shape(
        lambda: models.create(
            name, num_classes=num_classes, input_shape=input_shape, rngs=nnx.Rngs(0), **options
        )
    )


@pytest.fixture(scope="module")
def table():
    return models.table()


@pytest.mark.parametrize(
    ("name", "num_classes", "input_shape", "parameters"),
    [
        ("cifarnet", 10, (28, 28, 3), 1_387_786),
        ("cifarnet", 100, (28, 28, 3), 1_405_156),
        ("cifarnet_slim", 10, (28, 28, 3), 1_387_786),
        ("cifarnet_slim", 10, (29, 29, 3), 1_387_786),
        ("cifarnet_slim", 10, (32, 32, 3), 1_756_426),
        ("inception", 10, (29, 29, 3), 1_649_402),
        ("inception", 10, (28, 28, 3), 1_649_402),
        ("inception", 100, (29, 29, 3), 1_679_732),
        ("preact_resnet18", 10, (32, 32, 3), 11_171_274),
        ("preact_resnet18", 100, (32, 32, 3), 11_217_444),
        ("alexnet", 1000, (227, 227, 3), 60_965_224),
        ("resnet50", 1000, (224, 224, 3), 25_557_032),
        ("resnet_small", 10, (8, 8, 1), 77_754),
        ("resnet_small", 10, (28, 28, 1), 77_754),
        ("resnet_small", 10, (64, 64, 3), 78_042),
        ("resnet_small_gn", 10, (64, 64, 3), 78_042),
        ("mlp_1x512", 10, (28, 28, 3), 1_209_866),
        ("mlp_3x512", 10, (28, 28, 3), 1_735_178),
        # By hand: a last layer of 20 in place of 1000 classes has 980 × (4096 + 1) fewer, a grey
        # first convolution 2 × 5 × 5 × 64 fewer.
        ("alexnet", 20, (227, 227, 3), 60_965_224 - 980 * 4097),
        ("cifarnet", 10, (28, 28, 1), 1_387_786 - 3_200),
        ("mlp", 10, (8, 8, 1), (64 + 1) * 512 + (512 + 1) * 512 + (512 + 1) * 10),
    ],
)
def test_parameter_counts(table, name, num_classes, input_shape, parameters):
    assert models.Row(name, input_shape, num_classes, parameters) in table


def test_table_has_every_network_and_no_row_twice(table):
    assert {row.name for row in table} == set(models.names())
    assert len({row[:3] for row in table}) == len(table)


def test_names():
    assert models.names() == sorted(IMAGES)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown network 'lenet'.*alexnet, cifarnet, .*resnet50"):
        models.create("lenet", num_classes=10, input_shape=(28, 28, 1), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("name", "input_shape", "takes"),
    [
        ("alexnet", (224, 224, 3), r"AlexNet takes images of shape \(227, 227, channels\)"),
        ("cifarnet", (3, 28, 3), "height and width at least 4"),
        ("cifarnet_slim", (28, 28), r"\(height, width, channels\)"),
        ("inception", (32, 32, 3), r"\(28, 28, channels\) or \(29, 29, channels\)"),
        ("inception", (28, 29, 3), r"\(28, 28, channels\) or \(29, 29, channels\)"),
        ("preact_resnet18", (7, 32, 3), "height and width at least 8"),
        ("resnet50", (31, 31, 3), "height and width at least 32"),
        ("resnet50", (224, 224, 0), "height and width at least 32"),
        ("resnet_small", (7, 8, 1), "height and width at least 8"),
        ("mlp", (), "sizes at least 1"),
        ("mlp", (28, 0, 1), "sizes at least 1"),
    ],
)
def test_input_shape_that_does_not_fit(name, input_shape, takes):
    with pytest.raises(ValueError, match=takes) as error:
        models.create(name, num_classes=10, input_shape=input_shape, rngs=nnx.Rngs(0))
    assert f"got input_shape={input_shape}" in str(error.value)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_dropout_rate_out_of_range(rate):
    with pytest.raises(ValueError, match=f"at least 0 and below 1, got {rate}"):
        abstract("mlp", 10, (64,), dropout_rate=rate)


def test_no_classes():
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        abstract("mlp", 0, (64,))


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("alexnet", 0.5),
        ("cifarnet", 0.5),
        ("cifarnet_slim", 0.5),
        ("inception", 0.5),
        ("mlp", 0.0),
        ("preact_resnet18", 0.0),
        ("resnet50", 0.0),
        ("resnet_small", 0.0),
        ("resnet_small_gn", 0.0),
    ],
)
def test_dropout_rates(name, rate):
    assert abstract(name, 10, IMAGES[name]).dropout.rate == rate


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_dtypes_and_state(name):
    shape = (*IMAGES[name][:2], 1)

    def build_and_call():
        model = models.create(
            name,
            num_classes=7,
            input_shape=shape,
            rngs=nnx.Rngs(0),
            dtype=jnp.bfloat16,
            dropout_rate=0.7,
        )
        return model(jnp.zeros((2, *shape)), rngs=nnx.Rngs(1)), model

    logits, model = nnx.eval_shape(build_and_call)
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    _, params, batch_stats, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    leaves = jax.tree.leaves((params, batch_stats))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    # No state but the batch statistics: dropout keeps no key.
    assert not nnx.to_flat_state(rest)

    layers = [module for _, module in nnx.iter_modules(model)]
    assert [m.rate for m in layers if isinstance(m, nnx.Dropout)] == [0.7]
    computing = [m for m in layers if isinstance(m, _COMPUTING)]
    assert {m.dtype for m in computing} == {jnp.dtype(jnp.bfloat16)}


def test_options_reach_the_network():
    shapes = {
        leaf.shape
        for path, leaf in nnx.to_flat_state(
            nnx.state(abstract("mlp", 3, (5,), hidden=(7, 11)), nnx.Param)
        )
        if path[-1] == "kernel"
    }
    assert shapes == {(5, 7), (7, 11), (11, 3)}


def test_same_key_same_weights():
    def weights(seed):
        model = models.create("mlp", num_classes=10, input_shape=(3,), rngs=nnx.Rngs(seed))
        return jax.tree.leaves(nnx.state(model))[-1]

    assert (weights(3) == weights(3)).all()
    assert not (weights(3) == weights(4)).any()
