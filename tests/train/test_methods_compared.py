"""The methods that the paper compares with, each against its formula in NumPy's float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from tests.train import tiny
from tests.train.test_methods import config, make_batches, make_params
from train import augment, methods
from train import program as program_module
from train.methods import Aux, Task
from train.methods.azadi import group_norm
from train.methods.mentornet import Curriculum
from train.methods.noise_layer import NoiseLayer
from train.state import RawBatch

CLASSES = 3
TASK = Task(num_classes=CLASSES, multi_label=False, steps_per_epoch=10, parameters=())
PARAMS = make_params()
P64 = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS)


def loss_fn(params, batch, criterion=methods.cross_entropy):
    x = batch.images.reshape(len(batch.images), -1)
    x = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
    logits = x @ params["head"]["kernel"] + params["head"]["bias"]
    return jnp.mean(criterion(logits, batch.labels)), Aux(logits, ())


def run(of, batches, state=(), task=TASK):
    method = methods.make(of, task)
    gradient = jax.jit(lambda *arrays: method.gradient(loss_fn, *arrays))
    return jax.device_get(gradient(PARAMS, batches, state))


def forward(images):
    """Activations of the hidden layer, logits and their softmax, in float64."""
    x = np.asarray(images, np.float64).reshape(len(images), -1)
    hidden = np.tanh(x @ P64["first"]["kernel"] + P64["first"]["bias"])
    logits = hidden @ P64["head"]["kernel"] + P64["head"]["bias"]
    return hidden, logits, softmax(logits)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def backward(images, of_logits):
    """The gradient of a loss whose gradient in the logits is given."""
    x = np.asarray(images, np.float64).reshape(len(images), -1)
    hidden = forward(images)[0]
    of_hidden = of_logits @ P64["head"]["kernel"].T * (1 - hidden**2)
    return {
        "first": {"kernel": x.T @ of_hidden, "bias": of_hidden.sum(0)},
        "head": {"kernel": hidden.T @ of_logits, "bias": of_logits.sum(0)},
    }


def assert_gradient(actual, expected, tolerance=1e-6):
    """Within `tolerance` of the size of the whole gradient."""
    size = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(expected)))
    assert size > 1e-3
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * size),
        actual,
        expected,
    )


def flat():
    """All examples of the step: images [n, ...], labels [n], one-hot labels [n, classes]."""
    batches = make_batches()
    labels = np.asarray(batches.labels).reshape(-1)
    return np.asarray(batches.images).reshape(-1, 2, 3, 1), labels, np.eye(CLASSES)[labels]


# ------------------------------------------------------------------------------ changed losses


@pytest.mark.parametrize("epsilon", [0.1, 0.0, 0.4])
def test_label_smoothing(epsilon):
    images, _, given = flat()
    p = forward(images)[2]
    target = (1 - epsilon) * given + epsilon / CLASSES
    result = run(config("label_smoothing", smoothing=epsilon), make_batches())
    np.testing.assert_allclose(result.losses, [-(target * np.log(p)).sum(1).mean()], rtol=1e-6)
    assert_gradient(result.grads, backward(images, (p - target) / len(p)))
    assert result.weights is None
    assert result.aux.logits.shape == (1, len(p), CLASSES)


@pytest.mark.parametrize(("beta", "used"), [(None, 0.8), (0.3, 0.3)])
def test_hard_bootstrapping(beta, used):
    images, _, given = flat()
    p = forward(images)[2]
    target = used * given + (1 - used) * np.eye(CLASSES)[p.argmax(1)]
    result = run(config("bootstrapping", bootstrap_beta=beta), make_batches())
    np.testing.assert_allclose(result.losses, [-(target * np.log(p)).sum(1).mean()], rtol=1e-6)
    assert_gradient(result.grads, backward(images, (p - target) / len(p)))


@pytest.mark.parametrize(("beta", "used"), [(None, 0.95), (0.3, 0.3)])
def test_soft_bootstrapping_is_cross_entropy_regularised_by_entropy(beta, used):
    images, _, given = flat()
    p = forward(images)[2]
    entropy = -(p * np.log(p)).sum(1, keepdims=True)
    losses = -used * (given * np.log(p)).sum(1) + (1 - used) * entropy[:, 0]
    of_logits = used * (p - given) - (1 - used) * p * (np.log(p) + entropy)
    result = run(config("bootstrapping", bootstrap="soft", bootstrap_beta=beta), make_batches())
    np.testing.assert_allclose(result.losses, [losses.mean()], rtol=1e-6)
    assert_gradient(result.grads, backward(images, of_logits / len(p)))


@pytest.mark.parametrize("q", [0.7, 1.0, 0.01])
def test_generalized_cross_entropy(q):
    images, _, given = flat()
    p = forward(images)[2]
    of_label = (p * given).sum(1)
    result = run(config("gce", gce_q=q), make_batches())
    np.testing.assert_allclose(result.losses, [((1 - of_label**q) / q).mean()], rtol=1e-5)
    assert_gradient(result.grads, backward(images, of_label[:, None] ** q * (p - given) / len(p)))


@pytest.mark.parametrize(("beta", "weight"), [(0.7, 3.0), (0.9, 7.0)])
def test_early_learning_regularization(beta, weight):
    images, _, given = flat()
    rng = np.random.default_rng(0)
    task, batches = TASK._replace(num_examples=50), make_batches()
    of = config("elr", elr_beta=beta, elr_lambda=weight)
    targets = methods.make(of, task).init(PARAMS)
    np.testing.assert_array_equal(targets, np.zeros((50, CLASSES)))
    before = rng.dirichlet(np.ones(CLASSES), 50)
    indices = rng.permutation(50)[: len(images)].astype(np.int32)
    batches = batches._replace(indices=jnp.asarray(indices.reshape(batches.labels.shape)))

    p = forward(images)[2]
    after = beta * before[indices] + (1 - beta) * p
    agreement = (after * p).sum(1, keepdims=True)
    losses = -(given * np.log(p)).sum(1) + weight * np.log(1 - agreement[:, 0])
    # of log(1 - <p, t>) in the logits, t being constant
    of_logits = p - given + weight * -p * (after - agreement) / (1 - agreement)
    result = run(of, batches, jnp.asarray(before, jnp.float32), task)
    np.testing.assert_allclose(result.losses, [losses.mean()], rtol=1e-5)
    assert_gradient(result.grads, backward(images, of_logits / len(p)), 1e-5)
    expected = before.copy()
    expected[indices] = after
    np.testing.assert_allclose(result.state, expected, rtol=1e-5)


def test_early_learning_regularization_must_know_the_examples():
    of, targets = config("elr"), jnp.zeros((50, CLASSES))
    with pytest.raises(ValueError, match=r"RawBatch\.indices must say which examples these are"):
        methods.make(of, TASK).gradient(loss_fn, PARAMS, make_batches(), targets)


# --------------------------------------------------------------------------------------- mixup


draw = jax.jit(augment.mixup, static_argnames="alpha")


def mix(key, images, labels, alpha):
    """Mixed images and labels, from the λ and the partners that `augment.mixup` draws."""
    number = jnp.arange(len(images))
    _, partners, lam = draw(jax.random.fold_in(key, 1), images, number, alpha)
    partners, lam = np.asarray(partners), float(lam)
    assert 0 < lam < 1
    assert (partners != np.arange(len(images))).any()
    images, one_hot = np.asarray(images, np.float64), np.eye(CLASSES)[np.asarray(labels)]
    return (
        lam * images + (1 - lam) * images[partners],
        lam * one_hot + (1 - lam) * one_hot[partners],
    )


@pytest.mark.parametrize("alpha", [1.0, pytest.param(0.2, marks=pytest.mark.slow)])
def test_mixup_takes_the_step_as_one_mini_batch(alpha):
    batches = make_batches()
    images, labels, _ = flat()
    mixed, target = mix(batches.key[0], jnp.asarray(images), labels, alpha)
    p = forward(mixed)[2]
    result = run(config("mixup", mixup_alpha=alpha), batches)
    np.testing.assert_allclose(result.losses, [-(target * np.log(p)).sum(1).mean()], rtol=1e-5)
    assert_gradient(result.grads, backward(mixed, (p - target) / len(p)), 1e-5)
    assert result.weights is None


@pytest.mark.parametrize("form", ["streaming", "stacked"])
def test_bilevel_mixup_mixes_inside_each_mini_batch_and_then_weighs(form):
    batches = make_batches()
    of = config("bilevel_mixup", form=form)
    grads, losses = [], []
    for j in range(of.k):
        mixed, target = mix(batches.key[j], batches.images[j], batches.labels[j], 1.0)
        p = forward(mixed)[2]
        grads.append(backward(mixed, (p - target) / len(p)))
        losses.append(-(target * np.log(p)).sum(1).mean())
    rows = np.stack([np.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g in grads])
    omega = rows[1:] @ rows[0] / ((rows[1:] ** 2).sum(1) / of.lam + of.mu)
    omega /= np.abs(omega).sum()
    result = run(of, batches)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(result.weights, [0, *omega], atol=1e-5)
    expected = jax.tree.map(lambda *g: np.tensordot(omega, np.stack(g), 1), *grads[1:])
    assert_gradient(result.grads, expected, 1e-5)


@pytest.mark.slow
def test_mini_batches_that_share_their_key_mix_alike():
    batches = make_batches()
    keys = jnp.broadcast_to(batches.key[0], (8,))
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), batches._replace(key=keys))
    result = run(config("bilevel_mixup"), same)
    np.testing.assert_allclose(result.weights, [0] + [1 / 7] * 7, rtol=1e-5)
    result = run(config("bilevel_mixup"), same._replace(key=batches.key))
    assert np.ptp(result.weights[1:]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mixup", "bilevel_mixup"])
def test_mixup_is_for_several_labels_too(method):
    batches = make_batches()
    labels = jax.nn.one_hot(batches.labels, CLASSES, dtype=jnp.int32)
    task = TASK._replace(multi_label=True)
    result = run(config(method), batches._replace(labels=labels), task=task)
    if method == "mixup":
        images, given, _ = flat()
        mixed, target = mix(batches.key[0], jnp.asarray(images), given, 1.0)
        p = 1 / (1 + np.exp(-forward(mixed)[1]))
        assert_gradient(result.grads, backward(mixed, (p - target) / len(p)), 1e-5)
    assert np.isfinite(result.losses).all()


# --------------------------------------------------------------------------------- noise layer


class Linear(models.Network):
    def __init__(self, num_classes, input_shape, *, rngs, dtype=jnp.float32, dropout_rate=0.0):
        super().__init__(num_classes, input_shape, dropout_rate or 0.0)
        self.head = nnx.Linear(int(np.prod(input_shape)), num_classes, rngs=rngs)

    def logits(self, x, rngs):
        return self.head(x.reshape(len(x), -1))


def test_the_noise_channel():
    epsilon = 0.3
    network = Linear(CLASSES, (2, 3, 1), rngs=nnx.Rngs(0))
    noisy = NoiseLayer(network, epsilon)
    start = np.where(np.eye(CLASSES), np.log(1 - epsilon), np.log(epsilon / (CLASSES - 1)))
    np.testing.assert_allclose(noisy.channel[...], start, rtol=1e-6)
    b = start + np.random.default_rng(3).normal(size=start.shape)
    noisy.channel[...] = jnp.asarray(b, jnp.float32)

    images, labels, _ = flat()
    y = softmax(np.asarray(network(jnp.asarray(images)), np.float64))
    theta = softmax(b)
    z = y @ theta
    logits = noisy(jnp.asarray(images))
    np.testing.assert_allclose(logits, np.log(z), rtol=1e-5, atol=1e-6)
    # log-probabilities as logits: the cross-entropy is -log p(z | x)
    n = np.arange(len(labels))
    np.testing.assert_allclose(
        methods.cross_entropy(logits, jnp.asarray(labels)), -np.log(z[n, labels]), rtol=1e-5
    )
    noisy.eval()
    np.testing.assert_array_equal(noisy(jnp.asarray(images)), network(jnp.asarray(images)))
    noisy.train()
    np.testing.assert_array_equal(noisy(jnp.asarray(images)), logits)


SHAPE = (4, 4, 1)


def raw(seed=0, several=False):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 17, (4, 8, *SHAPE), np.uint8)
    if several:
        labels = rng.integers(0, 2, (4, 8, CLASSES), np.int32)
    else:
        labels = rng.integers(0, CLASSES, (4, 8), np.int32)
    return RawBatch(images, labels, labels, np.arange(32, dtype=np.int32).reshape(4, 8))


@functools.cache
def build(method, several=False, **changes):
    settings = {"schedule": "constant", "momentum": 0.0, "learning_rate": 0.5, **changes}
    return program_module.build(
        tiny.config(method=method, **settings),
        image_shape=SHAPE,
        max_value=16,
        num_classes=CLASSES,
        multi_label=several,
        steps_per_epoch=4,
        num_train=32,
    )


def one_step(method, several=False, **changes):
    """Parameters before and after, and the state after; the network is linear."""
    program = build(method, several, hidden=(), **changes)
    state = program.init(jax.random.key(0))
    before = jax.device_get(nnx.to_pure_dict(state.params))
    state = program.step(state, jax.device_put(raw(several=several)), jax.random.key(1))
    return before, jax.device_get(nnx.to_pure_dict(state.params)), state


def linear_logits(kernel, bias):
    x = raw().images.reshape(32, -1) / 16
    return x, x @ np.float64(kernel) + np.float64(bias)


def test_a_step_trains_the_network_and_its_noise_channel():
    before, after, state = one_step("noise_layer", channel_noise=0.2)
    head, b = before["network"]["head"], np.float64(before["channel"])
    x, logits = linear_logits(head["kernel"], head["bias"])
    labels = raw().labels.reshape(-1)
    y, theta = softmax(logits), softmax(b)
    joint = y * theta[:, labels].T  # p(y = i, z = label), [n, classes]
    posterior = joint / joint.sum(1, keepdims=True)
    of_logits = (y - posterior) / len(y)
    of_b = np.einsum("ni,nij->ij", posterior, theta - np.eye(CLASSES)[labels][:, None]) / len(y)
    new = after["network"]["head"]
    np.testing.assert_allclose(new["kernel"] - head["kernel"], -0.5 * x.T @ of_logits, atol=2e-7)
    np.testing.assert_allclose(new["bias"] - head["bias"], -0.5 * of_logits.sum(0), atol=2e-7)
    np.testing.assert_allclose(after["channel"] - before["channel"], -0.5 * of_b, atol=2e-7)
    assert np.abs(of_b).max() > 1e-3

    program = build("noise_layer", hidden=(), channel_noise=0.2)
    images = raw().images.reshape(32, *SHAPE)
    scores = program.predict(state.params, state.batch_stats, images, jax.random.key(0))
    _, logits = linear_logits(new["kernel"], new["bias"])
    np.testing.assert_allclose(scores, np.log(softmax(logits)), rtol=1e-4, atol=1e-5)


def test_the_noise_channel_is_not_decayed():
    before, after, _ = one_step("noise_layer")
    _, decayed, _ = one_step("noise_layer", weight_decay=0.5)
    np.testing.assert_array_equal(decayed["channel"], after["channel"])
    kernels = [tree["network"]["head"]["kernel"] for tree in (before, after, decayed)]
    np.testing.assert_allclose(kernels[2], kernels[1] - 0.25 * kernels[0], atol=2e-7)


# ------------------------------------------------------------------------------------ mentornet


@pytest.mark.parametrize(
    ("step", "phase"),
    [(0, "all"), (18, "all"), (19, "hard"), (89, "hard"), (90, "linear"), (99, "linear")],
)
def test_mentornet_weighs_examples_by_the_phase_of_training(step, phase):
    images, labels, given = flat()
    p = forward(images)[2]
    losses = -np.log(p[np.arange(len(p)), labels])
    before = 1.1
    threshold = 0.9 * before + 0.1 * np.percentile(losses, 60)
    assert 0 < (losses > threshold).sum() < len(losses)
    v = {
        "all": np.ones(len(p)),
        "hard": np.where(losses <= threshold, 1.0, 0.0),
        "linear": np.minimum(np.maximum(1 - (losses - threshold), 0), 1),
    }[phase]
    of = config("mentornet", epochs=10, loss_percentile=60.0)  # of 10 steps each
    result = run(of, make_batches(), Curriculum(jnp.int32(step), jnp.float32(before)))
    np.testing.assert_allclose(result.losses, [np.mean(v * losses)], rtol=1e-5)
    assert_gradient(result.grads, backward(images, v[:, None] * (p - given) / len(p)), 2e-6)
    assert result.state.step == step + 1
    np.testing.assert_allclose(result.state.percentile, threshold, rtol=1e-6)


def test_the_percentile_of_mentornet_is_averaged_over_steps():
    program = build("mentornet", hidden=())
    state = program.init(jax.random.key(0))
    average = 0.0
    for step in range(3):
        batch = raw(step)
        scores = program.predict(
            state.params, state.batch_stats, batch.images.reshape(32, *SHAPE), jax.random.key(0)
        )
        losses = -np.asarray(scores, np.float64)[np.arange(32), batch.labels.reshape(-1)]
        average = 0.9 * average + 0.1 * np.percentile(losses, 75)
        state = program.step(state, jax.device_put(batch), jax.random.key(1))
        assert int(state.method.step) == step + 1
        np.testing.assert_allclose(state.method.percentile, average, rtol=1e-5)


# ---------------------------------------------------------------------------------------- azadi


def group_norm64(x, kernel):
    total = 0.0
    for features in np.asarray(x, np.float64):
        for k in range(kernel.shape[1]):
            group = np.sqrt(np.sum((features * np.float64(kernel[:, k])) ** 2))
            total += group / np.sqrt(max(np.count_nonzero(features), 1))
    return total / len(x) / kernel.shape[1]


def features_and_kernel():
    rng = np.random.default_rng(5)
    x = np.maximum(rng.normal(size=(7, 6)), 0).astype(np.float32)
    x[2] = 0  # an image without features
    kernel = rng.normal(size=(6, 4)).astype(np.float32)
    kernel[:, 1] = 0  # a class without weights
    return x, kernel


def test_azadis_group_norm():
    x, kernel = features_and_kernel()
    np.testing.assert_allclose(
        group_norm(jnp.asarray(x), jnp.asarray(kernel)), group_norm64(x, kernel), rtol=1e-6
    )
    of_x, of_kernel = jax.grad(group_norm, argnums=(0, 1))(x, kernel)
    np.testing.assert_array_equal(of_x, 0)
    for j, k in ((0, 0), (3, 2), (5, 3)):
        step = np.zeros(kernel.shape)
        step[j, k] = 1e-6
        slope = (group_norm64(x, kernel + step) - group_norm64(x, kernel - step)) / 2e-6
        np.testing.assert_allclose(of_kernel[j, k], slope, rtol=1e-4)
    np.testing.assert_array_equal(of_kernel[:, 1], 0)  # no NaN at the kink


def test_azadis_regularizer_adds_its_gradient_to_the_last_layer():
    before, after, state = one_step("azadi", group_norm=3.0)
    plain_before, plain, plain_state = one_step("sgd")
    head, new = before["head"]["linear"], after["head"]["linear"]
    tiny.assert_same_bits(head, plain_before["head"])
    np.testing.assert_allclose(new["bias"], plain["head"]["bias"], atol=1e-7)
    x = raw().images.reshape(32, -1) / np.float32(16)
    norm = group_norm64(x, head["kernel"])
    np.testing.assert_allclose(state.sums.loss - plain_state.sums.loss, 3.0 * norm, rtol=1e-4)
    x2, kernel = np.asarray(x, np.float64) ** 2, np.asarray(head["kernel"], np.float64)
    scale = 1 / np.sqrt((x != 0).sum(1, keepdims=True)) / np.sqrt(x2 @ kernel**2)
    slope = kernel * (x2.T @ scale) / 32 / CLASSES
    np.testing.assert_allclose(
        new["kernel"] - plain["head"]["kernel"], -0.5 * 3.0 * slope, atol=2e-7
    )


def test_azadis_regularizer_needs_a_last_layer():
    class Headless(models.Network):
        pass

    network = methods.make(config("azadi"), TASK).network
    with pytest.raises(ValueError, match="must have an nnx.Linear named head, and Headless has"):
        network(Headless(CLASSES, SHAPE, 0.0))


# --------------------------------------------------------------------------------- all of them

BASELINES = (
    "mixup", "label_smoothing", "bootstrapping", "gce", "elr", "noise_layer", "mentornet", "azadi",
)  # fmt: skip


@pytest.mark.parametrize(
    "method",
    ["label_smoothing", "bootstrapping", "gce", "elr", "coherent_elr", "noise_layer", "mentornet"],
)
def test_methods_for_one_label_refuse_several(method):
    message = (
        f"method {method} is for one label per example, and here an example can have several: "
        "take one of sgd, uniform, bilevel, "
    )
    with pytest.raises(ValueError, match=message):
        methods.make(config(method), TASK._replace(multi_label=True))


def test_azadi_is_for_several_labels_too():
    _, after, state = one_step("azadi", several=True)
    _, plain, _ = one_step("sgd", several=True)
    assert int(state.failed) == -1
    assert np.abs(after["head"]["linear"]["kernel"] - plain["head"]["kernel"]).max() > 1e-4


@pytest.mark.parametrize(
    "method",
    ["noise_layer", "mentornet", "azadi", pytest.param("bilevel_mixup", marks=pytest.mark.slow)],
)
def test_the_state_keeps_its_structure_shapes_and_dtypes(method):
    program = build(method, hidden=())
    before = program.init(jax.random.key(0))
    spec = jax.eval_shape(lambda: before)
    old = jax.tree.leaves((before.params, before.method))
    after = program.step(before, jax.device_put(raw()), jax.random.key(1))
    assert jax.eval_shape(lambda: after) == spec
    assert all(x.is_deleted() for x in old)


@pytest.mark.slow
@pytest.mark.parametrize("method", BASELINES)
def test_it_costs_what_sgd_costs(method):
    def flops(method):
        program = build(method, hidden=(256,))
        state = jax.eval_shape(program.init, jax.random.key(0))
        lowered = program.step.lower(state, raw(), jax.random.key(0))
        return lowered.compile().cost_analysis()["flops"]

    # azadi: once more through the last layer, a seventh of this small network
    assert flops(method) < (1.3 if method == "azadi" else 1.1) * flops("sgd")
    assert flops("uniform") > 0.9 * flops("sgd")  # the figure tells something
