import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import models
from tests.train import tiny
from train import optimizers
from train import program as program_module
from train.config import Config
from train.state import RawBatch, State
from train.sums import OMEGA_BINS, OMEGA_RANGE, SHARE_BINS, Sums

KEY = jax.random.key(7)
SHAPE, CLASSES, MAX_VALUE = (8, 8, 1), 10, 16


def build(of, **changes):
    sizes = {
        "image_shape": SHAPE, "max_value": MAX_VALUE, "num_classes": CLASSES,
        "multi_label": False, "steps_per_epoch": 4,
    }  # fmt: skip
    return program_module.build(of, **{**sizes, **changes})


def config(**changes):
    return tiny.config(**{"schedule": "constant", "momentum": 0.0, "learning_rate": 0.5, **changes})


def raw(k=4, b=8, seed=0):
    """Random images; about half of the given labels are wrong."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, MAX_VALUE + 1, (k, b, *SHAPE), np.uint8)
    true = rng.integers(0, CLASSES, (k, b), np.int32)
    wrong = rng.random((k, b)) < 0.5
    given = np.where(wrong, (true + 1) % CLASSES, true).astype(np.int32)
    return RawBatch(images, given, true)


@functools.cache
def initial(seed=0):
    """Compiled once: what the network starts from does not depend on how it is trained."""
    return jax.device_get(build(config()).init(jax.random.key(seed)))


def start(of, params=None, batch_stats=None):
    params = jax.device_put(initial().params if params is None else params)
    state = initial()._replace(opt_state=optimizers.make(of, 4).init(params))
    batch_stats = state.batch_stats if batch_stats is None else batch_stats
    return jax.device_put(state._replace(params=params, batch_stats=batch_stats))


def one_step(of, batch=None, state=None):
    """The state before and after a step, as NumPy arrays."""
    program = build(of)
    state = start(of) if state is None else state
    before = jax.device_get(state)
    after = program.step(state, jax.device_put(raw() if batch is None else batch), KEY)
    return before, jax.device_get(after)


def leaves(params):
    """Parameters by name, such as 'hidden/0/kernel'."""
    return {
        "/".join(map(str, path)): np.asarray(value)
        for path, value in nnx.to_pure_dict(params).items()
        for path, value in nnx.traversals.flatten_mapping({path: value}).items()
    }


def changes_of(before, after):
    old, new = leaves(before.params), leaves(after.params)
    return {name: new[name] - old[name] for name in old}


def mlp_loss(params, images, labels):
    """The mean cross-entropy of an MLP with one hidden layer, from first principles."""
    x = images.reshape(len(images), -1)
    x = jnp.maximum(x @ params["hidden/0/kernel"] + params["hidden/0/bias"], 0)
    logits = x @ params["head/kernel"] + params["head/bias"]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[jnp.arange(len(labels)), labels])


def sgd_gradient(before, batch):
    params = jax.tree.map(jnp.asarray, leaves(before.params))
    images = jnp.asarray(batch.images.reshape(-1, *SHAPE) / MAX_VALUE, jnp.float32)
    return jax.grad(mlp_loss)(params, images, batch.labels.reshape(-1))


# ------------------------------------------------------------------------------ the update


def test_a_step_of_sgd_is_the_gradient_of_the_mean_cross_entropy_on_given_labels():
    of = config(method="sgd")
    batch = raw()
    before, after = one_step(of, batch)
    gradient = sgd_gradient(before, batch)
    for name, change in changes_of(before, after).items():
        np.testing.assert_allclose(change, -0.5 * gradient[name], atol=2e-7, err_msg=name)
    assert after.step == 1
    assert after.failed == -1


def test_weight_decay_comes_after_the_reweighting_and_touches_kernels_alone():
    plain = changes_of(*one_step(config()))
    before, after = one_step(config(weight_decay=0.1))
    decayed = changes_of(before, after)
    kernels = {"hidden/0/kernel", "head/kernel"}
    assert set(plain) == kernels | {"hidden/0/bias", "head/bias"}
    for name, value in leaves(before.params).items():
        if name in kernels:
            expected = plain[name] - 0.5 * 0.1 * value
            np.testing.assert_allclose(decayed[name], expected, atol=2e-7, err_msg=name)
        else:
            np.testing.assert_array_equal(decayed[name], plain[name], err_msg=name)


def norm(changes):
    return np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in changes.values()))


def test_clipping_bounds_the_norm_of_the_reweighted_gradient():
    free = changes_of(*one_step(config()))
    assert norm(free) > 0.2
    clipped = changes_of(*one_step(config(clip_norm=0.1)))
    assert norm(clipped) == pytest.approx(0.5 * 0.1, rel=1e-5)
    for name, change in clipped.items():
        np.testing.assert_allclose(change, free[name] * 0.05 / norm(free), atol=1e-7)


def test_a_gradient_within_the_bound_is_not_clipped():
    free = changes_of(*one_step(config(method="sgd")))
    loose = changes_of(*one_step(config(method="sgd", clip_norm=100.0)))
    for name, change in loose.items():
        np.testing.assert_allclose(change, free[name], atol=1e-7)


def test_weight_decay_is_not_clipped():
    before, after = one_step(config(method="sgd", clip_norm=0.1, weight_decay=0.2))
    changes = changes_of(before, after)
    for name in ("hidden/0/kernel", "head/kernel"):
        changes[name] = changes[name] + 0.5 * 0.2 * leaves(before.params)[name]
    assert norm(changes) == pytest.approx(0.5 * 0.1, rel=1e-4)


def test_momentum_adds_up_reweighted_gradients():
    of = config(method="sgd", learning_rate=0.1, momentum=0.9)
    program, batch = build(of), raw()
    states = [jax.device_get(state := start(of))]
    for _ in range(2):
        state = program.step(state, jax.device_put(batch), KEY)
        states.append(jax.device_get(state))
    first, second = (sgd_gradient(state, batch) for state in states[:2])
    for name, change in changes_of(states[1], states[2]).items():
        expected = -0.1 * (second[name] + 0.9 * first[name])
        np.testing.assert_allclose(change, expected, atol=2e-7, err_msg=name)


@pytest.mark.parametrize(
    ("schedule", "epochs", "expected"),
    [
        ("constant", 8, {0: 0.2, 31: 0.2}),
        ("exponential", 8, {0: 0.2, 3: 0.2, 4: 0.18, 7: 0.18, 8: 0.162, 31: 0.2 * 0.9**7}),
        ("steps", 8, {0: 0.2, 15: 0.2, 16: 0.02, 23: 0.02, 24: 0.002, 31: 0.002}),
        ("linear", 8, {0: 0.2, 8: 0.15, 16: 0.1, 31: 0.2 / 32, 32: 0.0}),
    ],
)
def test_schedules(schedule, epochs, expected):
    of = Config(schedule=schedule, epochs=epochs, learning_rate=0.2, decay=0.9)
    rate = optimizers.learning_rate(of, steps_per_epoch=4)
    for step, value in expected.items():
        assert rate(step) == pytest.approx(value, rel=1e-6, abs=1e-9), step


def test_the_schedule_drives_the_steps():
    of = config(method="sgd", schedule="steps", epochs=1)  # ÷ 10 at 2 and 3
    program, batch = build(of), raw()
    state = start(of)
    for rate in (0.5, 0.5, 0.05, 0.005):
        before = jax.device_get(state)
        state = program.step(state, jax.device_put(batch), KEY)
        gradient = sgd_gradient(before, batch)
        for name, change in changes_of(before, jax.device_get(state)).items():
            np.testing.assert_allclose(change, -rate * gradient[name], atol=2e-7, err_msg=name)


def test_bfloat16_computes_in_half_and_keeps_parameters_in_float32():
    full = one_step(config())
    half = one_step(config(dtype="bfloat16"))
    for state in half:
        for leaf in jax.tree.leaves((state.params, state.opt_state)):
            assert leaf.dtype in (np.float32, np.int32)
    tiny.assert_same_bits(half[0].params, full[0].params)
    loss, reference = half[1].sums.loss, full[1].sums.loss
    assert loss != reference
    assert loss == pytest.approx(reference, rel=0.02)
    # Rounded to bfloat16 nothing of a parameter would change below 2^-9 of it.
    assert norm(changes_of(*half)) == pytest.approx(norm(changes_of(*full)), rel=0.1)


# ----------------------------------------------------------------------------- randomness


def same_mini_batches(k=4, b=8):
    one = raw(1, b)
    return jax.tree.map(lambda x: np.repeat(x, k, axis=0), one)


def omega_columns(**changes):
    """Columns of the histogram of ω that the k - 1 equal training mini-batches fall into."""
    _, after = one_step(config(dropout_rate=0.5, **changes), same_mini_batches())
    return np.flatnonzero(after.sums.omega.sum(0))


def test_mini_batches_share_their_dropout_masks_unless_told_otherwise():
    uniform = int((1 + OMEGA_RANGE) / (2 * OMEGA_RANGE) * OMEGA_BINS)
    assert omega_columns(dropout_masks="shared").tolist() == [uniform]
    assert len(omega_columns(dropout_masks="independent")) > 1


def test_dropout_masks_differ_between_steps():
    of = config(dropout_rate=0.5)
    program, batch = build(of), jax.device_put(raw())
    losses = []
    for step in (0, 1, 0):
        state = start(of)._replace(step=jnp.int32(step))
        losses.append(float(program.step(state, batch, KEY).sums.loss))
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.slow
def test_augmentation_differs_between_steps_and_between_examples():
    of = config(augmentation="preactresnet")
    program = build(of)
    one = raw(1, 1)
    batch = jax.device_put(jax.tree.map(lambda x: np.tile(x, (4, 8) + (1,) * (x.ndim - 2)), one))
    states = [program.step(start(of)._replace(step=jnp.int32(step)), batch, KEY) for step in (0, 1)]
    losses = [float(state.sums.loss) for state in states]
    assert losses[0] != losses[1]
    # Crops that were the same in all mini-batches would give equal weights, in one column.
    assert len(np.flatnonzero(np.asarray(states[0].sums.omega).sum(0))) > 1


# ----------------------------------------------------------------------- batch statistics


class BatchNormalized(models.Network):
    """A linear classifier of batch-normalised pixels."""

    def __init__(self, num_classes, input_shape, *, rngs, dtype=jnp.float32, dropout_rate=0.0):
        super().__init__(num_classes, input_shape, dropout_rate)
        size = int(np.prod(input_shape))
        self.bn = nnx.BatchNorm(size, momentum=0.8, rngs=rngs)
        self.head = nnx.Linear(size, num_classes, rngs=rngs)

    def logits(self, x, rngs):
        return self.head(self.bn(x.reshape(len(x), -1)))


@pytest.fixture
def _batch_normalized(monkeypatch):
    def create(name, *, num_classes, input_shape, rngs, dtype, dropout_rate):
        return BatchNormalized(num_classes, input_shape, rngs=rngs)

    initial()  # with the real network
    monkeypatch.setattr(models, "create", create)
    monkeypatch.setattr(program_module, "_build", program_module._build.__wrapped__)


def start_normalized(of):
    model = BatchNormalized(CLASSES, SHAPE, rngs=nnx.Rngs(0))
    return start(of, *nnx.split(model, nnx.Param, ...)[1:])


@pytest.mark.usefixtures("_batch_normalized")
@pytest.mark.parametrize(
    ("method", "policy", "used"),
    [
        pytest.param("bilevel", "mean", [0, 1, 2, 3], marks=pytest.mark.slow),
        ("uniform", "mean", [0, 1, 2, 3]),
        ("uniform", "training", [2, 3]),
        ("uniform", "validation", [0, 1]),
    ],
)
def test_running_averages_are_of_the_mini_batches_that_the_policy_names(method, policy, used):
    of = config(
        method=method, hidden=None, num_validation=2, batch_statistics=policy, augmentation="none"
    )
    batch = raw()
    before, after = one_step(of, batch, start_normalized(of))
    x = (batch.images / MAX_VALUE).reshape(4, 8, 64)
    stats = nnx.to_pure_dict(after.batch_stats)["bn"]
    np.testing.assert_allclose(stats["mean"], 0.2 * x.mean(1)[used].mean(0), atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.8 + 0.2 * x.var(1)[used].mean(0), atol=1e-6)
    assert set(nnx.to_pure_dict(before.params)) == {"bn", "head"}


@pytest.mark.usefixtures("_batch_normalized")
def test_sgd_averages_over_all_examples_at_once():
    of = config(method="sgd", hidden=None)
    batch = raw()
    _, after = one_step(of, batch, start_normalized(of))
    x = (batch.images / MAX_VALUE).reshape(32, 64)
    stats = nnx.to_pure_dict(after.batch_stats)["bn"]
    np.testing.assert_allclose(stats["mean"], 0.2 * x.mean(0), atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.8 + 0.2 * x.var(0), atol=1e-6)


@pytest.mark.usefixtures("_batch_normalized")
def test_prediction_uses_the_running_averages_and_leaves_them():
    of = config(method="uniform", hidden=None)
    program, state = build(of), start_normalized(of)
    images = raw().images.reshape(-1, *SHAPE)
    together = program.predict(state.params, state.batch_stats, images, KEY)
    alone = program.predict(state.params, state.batch_stats, images[:1], KEY)
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)


@pytest.mark.usefixtures("_batch_normalized")
def test_a_failure_in_the_running_averages_is_recorded():
    of = config(method="uniform", hidden=None)
    program, state = build(of), start_normalized(of)
    state = state._replace(
        batch_stats=jax.tree.map(lambda x: x.at[3].set(jnp.nan), state.batch_stats)
    )
    # Training normalises by the mini-batch: the parameters stay finite.
    after = program.step(state, jax.device_put(raw()), KEY)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(after.params))
    assert int(after.failed) == 0


# ---------------------------------------------------------------------------------- failures


def test_the_first_step_that_leaves_nan_is_recorded_and_stays():
    program, batch = build(config()), jax.device_put(raw())
    state = start(config())
    for _ in range(2):
        state = program.step(state, batch, KEY)
    assert int(state.failed) == -1
    flat, structure = jax.tree.flatten(state.params)
    flat[0] = flat[0].at[0].set(jnp.nan)
    state = state._replace(params=jax.tree.unflatten(structure, flat))
    for _ in range(3):
        state = program.step(state, batch, KEY)
    assert int(state.failed) == 2
    assert int(state.step) == 5


def test_a_step_without_a_finite_loss_is_a_failure_even_if_the_rule_drops_it():
    program, batch = build(config()), jax.device_put(raw())
    state = start(config())
    state = state._replace(params=jax.tree.map(lambda x: x * 1e30, state.params))
    before = jax.device_get(state)
    after = jax.device_get(program.step(state, batch, KEY))
    tiny.assert_same_bits(after.params, before.params)  # a zero update
    assert after.failed == 0
    assert after.sums.dropped == 4
    assert after.sums.losses == 0


# -------------------------------------------------------------------------------------- sums


def test_sums_of_a_step_by_hand():
    program, batch = build(config()), raw()
    state = start(config())
    images = batch.images.reshape(-1, *SHAPE)
    scores = np.asarray(program.predict(state.params, state.batch_stats, images, KEY))
    predicted = scores.argmax(1).reshape(4, 8)
    sums = jax.device_get(program.step(state, jax.device_put(batch), KEY)).sums
    assert sums.given == (predicted == batch.labels).sum()
    assert sums.true == (predicted == batch.true).sum()
    assert sums.given != sums.true
    assert (sums.examples, sums.losses, sums.steps, sums.dropped) == (32, 4, 1, 0)
    loss = -scores[np.arange(32), batch.labels.reshape(-1)].reshape(4, 8).mean(1)
    assert sums.loss == pytest.approx(loss.sum(), rel=1e-5)


def test_weights_are_counted_by_the_share_of_wrong_labels():
    of = config(method="uniform", num_validation=2, k=7)
    batch = raw(7, 8)
    true = np.zeros((7, 8), np.int32)
    given = true.copy()
    for j, wrong in enumerate((8, 8, 0, 2, 4, 6, 6)):  # of 8; the first two are validation
        given[j, :wrong] = 1
    _, after = one_step(of, batch._replace(labels=given, true=true))
    sums = after.sums
    assert sums.omega.shape == (SHARE_BINS, OMEGA_BINS)
    assert sums.omega.sum(1).tolist() == [1, 1, 1, 2, 0]
    np.testing.assert_allclose(sums.omega_sum, [1, 1, 1, 2, 0], rtol=1e-6)
    column = int((1 + OMEGA_RANGE) / (2 * OMEGA_RANGE) * OMEGA_BINS)
    assert np.flatnonzero(sums.omega.sum(0)).tolist() == [column]
    assert sums.effective == pytest.approx(5, rel=1e-6)
    assert sums.negative == 0


def test_sums_add_up_over_steps_and_start_anew_with_an_epoch():
    program = build(config())
    state = start(config())
    for seed in range(3):
        state = program.step(state, jax.device_put(raw(seed=seed)), KEY)
    sums = jax.device_get(state.sums)
    assert (sums.steps, sums.examples, sums.losses) == (3, 96, 12)
    assert sums.omega.sum() == 9  # k - 1 a step
    assert 0 < sums.effective <= 9
    step, params = int(state.step), jax.device_get(state.params)
    state = program.new_epoch(state)
    tiny.assert_same_bits(state.sums, Sums.zeros())
    assert int(state.step) == step
    tiny.assert_same_bits(state.params, params)


def test_weights_beyond_the_histogram_are_counted_in_its_outer_bars():
    # Without the normalisation, and with next to nothing in the denominator, ω is 1 / |g|² or so.
    _, after = one_step(config(lam=1e6, mu=1e-6, normalize=False))
    assert after.sums.omega.sum() == 3
    assert after.sums.omega[:, 1:-1].sum() == 0
    assert np.abs(after.sums.omega_sum).sum() > 100


# -------------------------------------------------------------------------- what jit is about


def test_the_state_is_donated():
    program = build(config())
    state = start(config())
    old = jax.tree.leaves((state.params, state.opt_state, state.sums))
    new = program.step(state, jax.device_put(raw()), KEY)
    assert all(x.is_deleted() for x in old)
    old = jax.tree.leaves(new.params)
    program.new_epoch(new)
    assert all(x.is_deleted() for x in old)


def test_one_trace_serves_all_steps_epochs_and_seeds():
    programs = [build(config(method="uniform", seed=seed)) for seed in range(2)]
    assert programs[0] is programs[1]
    for seed, program in enumerate(programs):
        state = program.init(jax.random.key(seed))
        for step in range(3):
            state = program.step(state, jax.device_put(raw(seed=step)), jax.random.key(seed))
            state = program.new_epoch(state)
    assert programs[0].step._cache_size() == 1
    assert programs[0].new_epoch._cache_size() == 1
    assert build(config(method="sgd")) is not programs[0]


def test_the_state_keeps_its_structure_shapes_and_dtypes():
    program = build(config())
    before = program.init(KEY)
    spec = jax.eval_shape(lambda: before)
    after = program.step(before, jax.device_put(raw()), KEY)
    assert jax.eval_shape(lambda: after) == spec
    assert isinstance(after, State)


def test_seeds_give_different_weights_and_the_same_seed_the_same():
    program = build(config())
    first, again, other = (
        jax.device_get(program.init(jax.random.key(seed)).params) for seed in (0, 0, 1)
    )
    tiny.assert_same_bits(first, again)
    assert norm({"": leaves(first)["head/kernel"] - leaves(other)["head/kernel"]}) > 0.1


# ------------------------------------------------------------------------------- prediction


def test_predictions_have_no_dropout_unless_it_is_left_on():
    program = build(config(dropout_rate=0.5))
    state = start(config())
    images = raw().images.reshape(-1, *SHAPE)

    def predict(seed, **options):
        return np.asarray(
            program.predict(
                state.params, state.batch_stats, images, jax.random.key(seed), **options
            )
        )

    np.testing.assert_array_equal(predict(0), predict(1))
    np.testing.assert_allclose(np.exp(predict(0)).sum(1), 1, rtol=1e-5)
    assert np.abs(predict(0, dropout=True) - predict(1, dropout=True)).max() > 0.1
    np.testing.assert_array_equal(predict(0, dropout=True), predict(0, dropout=True))


@pytest.mark.slow
@pytest.mark.parametrize("multi_label", [False, True])
def test_predictions_are_averaged_over_views(multi_label):
    from train import augment

    shape = (230, 229, 1)
    of = config(augmentation="imagenet", hidden=(4,))
    program = build(of, image_shape=shape, multi_label=multi_label, num_classes=3)
    network = models.create(
        "mlp", num_classes=3, input_shape=(227, 227, 1), rngs=nnx.Rngs(0), hidden=(4,)
    )
    model_params = nnx.state(network, nnx.Param)
    image = np.random.default_rng(0).integers(0, MAX_VALUE + 1, (1, *shape), np.uint8)
    scores = np.asarray(program.predict(model_params, initial().batch_stats, image, KEY))[0]

    views = augment.preset("imagenet", shape, MAX_VALUE).views
    assert views is not None
    crops = np.asarray(views(KEY, jnp.asarray(image[0]))).reshape(10, -1)
    params = leaves(model_params)
    hidden = np.maximum(crops @ params["hidden/0/kernel"] + params["hidden/0/bias"], 0)
    logits = hidden @ params["head/kernel"] + params["head/bias"]
    if multi_label:
        expected = (1 / (1 + np.exp(-logits))).mean(0)
    else:
        expected = np.log(np.asarray(jax.nn.softmax(logits)).mean(0))
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    assert np.ptp(logits, axis=0).max() > 1e-2  # the views do differ


def test_several_labels_sum_their_cross_entropies():
    of = config(method="sgd")
    program = build(of, multi_label=True, num_classes=CLASSES)
    batch = raw()
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, (4, 8, CLASSES), np.int32)
    state = start(of)
    images = batch.images.reshape(-1, *SHAPE)
    chances = np.asarray(program.predict(state.params, state.batch_stats, images, KEY))
    flat = labels.reshape(-1, CLASSES)
    cross_entropy = -np.where(flat == 1, np.log(chances), np.log1p(-chances)).sum(1)
    sums = program.step(state, jax.device_put(RawBatch(batch.images, labels, labels)), KEY).sums
    assert float(sums.loss) == pytest.approx(cross_entropy.mean(), rel=1e-5)
    # the class with the top score is one of the labels
    assert float(sums.given) == flat[np.arange(32), chances.argmax(1)].sum()


def test_the_optimizer_is_what_the_docstring_says():
    of = config(clip_norm=1.0, weight_decay=0.1, momentum=0.9)
    params = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full(2, 2.0)}
    grads = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.zeros(2)}
    tx = optimizers.make(of, 4)
    updates: Any = tx.update(grads, tx.init(params), params)[0]
    # clipped to norm 1: 0.5 each; decayed: 0.5 + 0.1 · 2; times the rate 0.5
    np.testing.assert_allclose(updates["kernel"], -0.5 * (0.5 + 0.2), rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)
    assert optax.tree.get(tx.init(params), "trace") is not None
