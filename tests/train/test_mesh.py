"""On meshes of eight devices: the states of one device, after several steps."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

import models
from benchmarks import traffic
from tests.train import tiny
from train import feed, mesh
from train import program as program_module
from train.state import Examples, RawBatch

SHAPE, CLASSES, B, STEPS = (8, 8, 1), 10, 8, 3


class Normalized(models.Network):
    """Batch norm and dropout between two linear layers."""

    def __init__(self, num_classes, input_shape, *, rngs, dropout_rate):
        super().__init__(num_classes, input_shape, dropout_rate)
        self.first = nnx.Linear(64, 16, rngs=rngs)
        self.bn = nnx.BatchNorm(16, momentum=0.8, rngs=rngs)
        self.head = nnx.Linear(16, num_classes, rngs=rngs)

    def logits(self, x, rngs):
        x = nnx.relu(self.bn(self.first(x.reshape(len(x), -1))))
        return self.head(self.dropout(x, rngs=rngs))


@pytest.fixture(autouse=True)
def _normalized(monkeypatch):
    def create(name, *, num_classes, input_shape, rngs, dtype, dropout_rate, hidden):
        return Normalized(num_classes, input_shape, rngs=rngs, dropout_rate=dropout_rate or 0.0)

    monkeypatch.setattr(models, "create", create)


def config(**changes):
    options = {"b": B, "momentum": 0.9, "weight_decay": 0.01, "clip_norm": 1.0, "mu": 0.1}
    return tiny.config(**{**options, **changes})


def raw(k, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 17, (k, B, *SHAPE), np.uint8)
    true = rng.integers(0, CLASSES, (k, B), np.int32)
    given = np.where(rng.random((k, B)) < 0.5, (true + 1) % CLASSES, true)
    return RawBatch(images, given, true, np.arange(k * B, dtype=np.int32).reshape(k, B))


def judges(program, seed):
    """Held-out examples that judge the step, where the method asks for them."""
    if not program.judges:
        return None
    rng = np.random.default_rng(100 + seed)
    images = rng.integers(0, 17, (program.judges, *SHAPE), np.uint8)
    return Examples(images, rng.integers(0, CLASSES, program.judges, np.int32))


def put(batch, program):
    """A batch on the program's mesh, and whole what every device is to have whole."""
    copies = program.copies
    with_copies = jax.tree.map(lambda x: np.concatenate([x[:copies], x]), batch)
    return feed.place(with_copies, program.layout, batch.labels.shape, copies)


def train(of, layout):
    """The state after some steps, and the scores of 16 images."""
    build = program_module._build.__wrapped__
    program = build(of, SHAPE, 16, CLASSES, False, 4, layout, of.k * B, 0)
    key = jax.random.key(3)
    state = program.init(jax.random.key(0))
    place = jax.device_put if layout is None else functools.partial(put, program=program)
    images = raw(of.k, 99).images.reshape(-1, *SHAPE)[:16]
    if layout is not None:
        key = layout.copy(key)
        images = layout.place(images, (16,))
    for seed in range(STEPS):
        batch = place(jax.tree.map(np.ascontiguousarray, raw(of.k, seed)))
        put_judges = jax.device_put if layout is None else layout.copy
        batch = batch._replace(judges=put_judges(judges(program, seed)))
        with jax.transfer_guard("disallow"):
            state = program.step(state, batch, key)
    return state, program.predict(state.params, state.batch_stats, images, key)


def assert_close(actual, expected, tolerance):
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, x), y in zip(paths, jax.tree.leaves(actual), strict=True):
        name = jax.tree_util.keystr(path)
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape, name
        assert np.linalg.norm(x - y) <= tolerance * max(np.linalg.norm(x), 0.05), name


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("method", "k", "sharded", "changes"),
    [
        ("bilevel", 16, True, {"num_validation": 2}),
        ("bilevel", 4, False, {"batch_statistics": "training", "example_alignment": True}),
        slow("bilevel", 8, True, {"augmentation": "preactresnet", "dropout_rate": 0.5}),
        slow("bilevel", 8, False, {"form": "streaming"}),
        slow("bilevel", 24, False, {"dropout_rate": 0.5, "dropout_masks": "independent"}),
        slow("bilevel_exact", 8, True, {"mu": 5.0}),
        slow("uniform", 16, True, {}),
        slow("sgd", 8, True, {"dropout_rate": 0.5}),
        slow("bilevel_mixup", 4, False, {}),
        slow("bilevel_mixup", 16, True, {}),
        slow("mixup", 4, False, {}),
        slow("mentornet", 8, True, {}),
        slow("azadi", 8, False, {}),
        slow("elr", 8, True, {}),
        ("coherent", 16, True, {"example_alignment": True}),
        slow("coherent", 8, False, {}),
        slow("coherent", 4, False, {"batch_statistics": "training"}),
    ],
)
def test_trains_to_the_state_of_one_device(method, k, sharded, changes):
    of = config(method=method, k=k, **changes)
    expected = train(config(**{**of.to_json(), "form": "auto", "hidden": of.hidden}), None)
    layout = mesh.choose(k, B, sharded=sharded)
    actual = train(of, layout)
    assert_close(actual, expected, 2e-5)
    if method == "coherent":
        direction = actual[0].opt_state.direction["first"]["kernel"].get_value()
        shard = direction.addressable_shards[0].data
        assert shard.size == direction.size // (8 if sharded else 1)
    kernel = actual[0].params["first"]["kernel"].get_value()
    like_it = [x for x in jax.tree.leaves(actual[0].opt_state) if x.shape == kernel.shape]
    for x in (kernel, *like_it):
        assert x.addressable_shards[0].data.size == x.size // (8 if sharded else 1)
    assert len(like_it) == (2 if method == "coherent" else 1)  # the momentum, and the direction
    assert actual[0].batch_stats["bn"]["mean"].get_value().sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("method", "k"),
    [
        ("bilevel", 4),
        ("coherent", 8),
        ("bilevel", 16),
        *(
            slow(method, k)
            for k in (4, 8, 16)
            for method in ("bilevel", "coherent", "uniform", "sgd")
            if (method, k) not in (("bilevel", 4), ("coherent", 8), ("bilevel", 16))
        ),
    ],
)
def test_a_step_moves_a_gradient_and_little_else(method, k):
    of, classes = config(method=method, k=k), 2000  # all logits are more than a gradient
    layout = mesh.choose(k, B)
    program = program_module._build.__wrapped__(of, SHAPE, 16, classes, False, 4, layout, 512, 0)
    state = program.init(layout.copy(jax.random.key(0)))
    batch = put(raw(k, 0), program)._replace(judges=layout.copy(judges(program, 0)))
    text = program.step.lower(state, batch, layout.copy(jax.random.key(1))).compile().as_text()
    gradient = sum(4 * x.size for x in jax.tree.leaves(state.params))
    per_example = 100 * k * B
    moved = sum(traffic.bytes_moved(text, 8).values())
    assert 2 * 7 / 8 * gradient < moved < 1.02 * 2 * 7 / 8 * gradient + per_example


@pytest.mark.slow
def test_examples_of_a_mini_batch_drop_units_of_their_own():
    """On devices that share a mini-batch the masks are others than on one device, and differ."""
    of = config(k=4, dropout_rate=0.5)
    spread, alone = train(of, mesh.choose(4, B)), train(of, None)
    first, other = (
        np.asarray(state.params["first"]["kernel"].get_value()) for state, *_ in (spread, alone)
    )
    assert np.linalg.norm(first - other) > 1e-3
    assert np.isfinite(first).all()


@pytest.mark.parametrize(
    ("k", "count", "shape", "per_device"),
    [
        (8, 8, (8, 1), 1),
        (32, 8, (8, 1), 4),
        (2, 8, (2, 4), 1),
        (6, 3, (3, 1), 2),
        (4, 1, (1, 1), 4),
    ],
)
def test_the_layout_follows_from_k_and_the_number_of_devices(k, count, shape, per_device):
    layout = mesh.choose(k, 8, count)
    assert tuple(layout.mesh.shape.values()) == shape
    assert (layout.per_device, layout.spread) == (per_device, shape[1])
    assert layout.mesh.size == count


@pytest.mark.parametrize(
    ("k", "b", "count", "message"),
    [
        (3, 8, 8, r"k = 3 mini-batches do not fit 8 devices: .* \(2, 4, 8, 16, 24, …\)"),
        (12, 8, 8, r"k = 12 .* \(2, 4, 8, 16, 24, …\)"),
        (2, 6, 8, "lies on 4 of the 8 devices, and b = 6 .* b must be a multiple of 4"),
        (8, 8, 9, "devices must be from 1 to the 8 there are, got 9"),
        (8, 8, 0, "devices must be from 1 to the 8 there are, got 0"),
    ],
)
def test_what_does_not_fit_says_what_does(k, b, count, message):
    with pytest.raises(ValueError, match=message):
        mesh.choose(k, b, count)


def test_a_process_with_all_devices_loads_everything():
    for k in (4, 16):
        layout = mesh.choose(k, 8)
        np.testing.assert_array_equal(
            np.arange(k * 8).reshape(k, 8)[layout.part((k, 8))].size, k * 8
        )
        placed = layout.place(np.arange(k * 8).reshape(k, 8), (k, 8))
        assert len(placed.addressable_shards) == 8
        assert placed.addressable_shards[0].data.size == k


def test_keys_and_values_are_copied_to_all_devices():
    layout = mesh.choose(8, 8)
    key, x = layout.copy((jax.random.key(3), np.arange(3)))
    assert key.is_fully_replicated
    assert len(x.addressable_shards) == 8
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(jax.random.key(3)))


def test_no_mapped_axis_outside_of_shard_map():
    assert mesh.example_axis() is None
