import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train import tiny
from tests.train.known import some
from tests.train.test_program import CLASSES, KEY, build, config, raw, start
from train import evidence, trainer
from train.config import ConfigError
from train.evidence import Evidence
from train.methods import cross_entropy
from train.run_directory import read_metrics
from train.state import Examples, Measured


def in_numpy(logits, labels):
    """Loss, margin and agreement of each example, in float64."""
    logits = np.asarray(logits, np.float64)
    rows = np.arange(len(labels))
    given = logits[rows, labels]
    others = logits.copy()
    others[rows, labels] = -np.inf
    margin = given - others.max(axis=1)
    return np.log(np.exp(logits).sum(axis=1)) - given, margin, margin > 0


def test_sums_per_example_of_loss_margin_and_agreement():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 6).astype(np.int32)
    gathered, expected = Evidence.zeros(6), np.zeros((4, 6))
    for indices in ([0, 2, 4], [4, 0, 1]):  # 0 and 4 twice, 3 and 5 never
        logits = rng.normal(size=(3, 5)).astype(np.float32) * 3
        indices = jnp.array(indices)
        gathered = gathered.add(indices, Evidence.seen(labels[indices], jnp.asarray(logits)))
        loss, margin, agreed = in_numpy(logits, labels[indices])
        expected[:, indices] += (np.ones(3), loss, margin, agreed)
    assert gathered.alignment is None
    np.testing.assert_allclose(np.stack(gathered[:4]), expected, rtol=1e-5)
    assert [x.dtype for x in gathered[:4]] == [jnp.int32, jnp.float32, jnp.float32, jnp.int32]
    means = evidence.means(gathered)
    assert np.isnan(means.score[[3, 5]]).all()
    assert np.isnan(means.loss[[3, 5]]).all()
    np.testing.assert_allclose(means.score[[0, 4]], -expected[2, [0, 4]] / 2, rtol=1e-5)
    np.testing.assert_allclose(means.loss[1], expected[1, 1], rtol=1e-5)
    np.testing.assert_array_equal(means.agreement[[0, 4]], expected[3, [0, 4]] / 2)


def test_an_example_twice_in_a_step_counts_twice():
    logits = jnp.asarray([[1.0, 0.0], [4.0, 1.0]])
    gathered = Evidence.zeros(2).add(jnp.array([1, 1]), Evidence.seen(jnp.array([0, 1]), logits))
    assert gathered.visits.tolist() == [0, 2]
    assert gathered.margin.tolist() == [0, 1 - 3]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_no_visit(bad):
    logits = jnp.asarray([[1.0, bad, 0.0], [0.0, 2.0, 1.0]])
    gathered = Evidence.zeros(2).add(jnp.array([0, 1]), Evidence.seen(jnp.array([0, 1]), logits))
    assert gathered.visits.tolist() == [0, 1]
    assert gathered.margin.tolist() == [0, 1]
    assert float(gathered.loss[0]) == 0
    assert gathered.agreed.tolist() == [0, 1]


def test_a_step_adds_its_own_logits_from_before_the_update():
    of, batch = config(method="sgd"), raw()
    indices = np.random.default_rng(1).permutation(50)[:32].reshape(4, 8).astype(np.int32)
    state = start(of)._replace(evidence=Evidence.zeros(50))
    program = build(of, num_train=50)
    images = batch.images.reshape(-1, *batch.images.shape[2:])
    logits = program.predict(state.params, state.batch_stats, images, KEY)
    after = jax.device_get(
        program.step(state, jax.device_put(batch._replace(indices=indices)), KEY)
    )
    loss, margin, agreed = in_numpy(logits, batch.labels.ravel())
    seen = after.evidence
    np.testing.assert_array_equal(seen.visits[indices], 1)
    assert seen.visits.sum() == 32
    np.testing.assert_allclose(seen.loss[indices.ravel()], loss, rtol=1e-4)
    np.testing.assert_allclose(seen.margin[indices.ravel()], margin, atol=1e-4)
    assert seen.agreed.sum() == after.sums.given == agreed.sum()


def test_gathering_evidence_leaves_the_training_as_it_is():
    of, batch = config(), raw()
    plain = build(of).step(start(of), jax.device_put(batch), KEY)
    assert plain.evidence is None
    indices = np.arange(32, dtype=np.int32).reshape(4, 8)
    state = start(of)._replace(evidence=Evidence.zeros(32))
    program = build(of, num_train=32)
    gathered = program.step(state, jax.device_put(batch._replace(indices=indices)), KEY)
    tiny.assert_same_bits(gathered._replace(evidence=None), plain)


@pytest.mark.parametrize(
    "method", [pytest.param("sgd", marks=pytest.mark.slow), "bilevel", "coherent"]
)
def test_a_step_adds_every_gradient_s_inner_product_with_the_momentum(method):
    of, batch = config(method=method, example_alignment=True), raw()
    judges = Examples(batch.images.reshape(32, 8, 8, 1)[:16], batch.labels.ravel()[:16])
    indices = np.arange(32, dtype=np.int32)[::-1].reshape(4, 8)
    batch = batch._replace(indices=indices, judges=judges)
    program = build(of, num_train=32)
    state = program.step(program.init(KEY), jax.device_put(batch), KEY)
    np.testing.assert_array_equal(state.evidence.alignment, 0)  # there was no momentum yet
    state = jax.device_get(state)
    after = program.step(jax.device_put(state), jax.device_put(batch), KEY)
    momentum = jax.flatten_util.ravel_pytree(optax.tree.get(state.opt_state, "trace"))[0]
    images = batch.images.reshape(-1, 1, *batch.images.shape[2:])

    def gradient(image, label):
        def loss(params):
            scores = program.predict(params, state.batch_stats, image, KEY)
            return cross_entropy(scores, label[None])[0]

        return jax.flatten_util.ravel_pytree(jax.grad(loss)(state.params))[0]

    grads = jax.jit(jax.vmap(gradient))(images, batch.labels.ravel())
    expected = np.asarray(grads) @ momentum / np.linalg.norm(momentum)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(after.evidence.alignment[::-1], expected, rtol=1e-3, atol=1e-5)


def test_alignment_leaves_the_training_as_it_is_and_averages_over_visits():
    batch = raw()._replace(indices=np.arange(32, dtype=np.int32).reshape(4, 8))
    results = []
    for alignment in (False, True):
        program = build(config(example_alignment=alignment), num_train=32)
        state = program.init(KEY)
        for _ in range(3):
            state = program.step(state, jax.device_put(batch), KEY)
        results.append(jax.device_get(state))
    plain, gathered = results
    sums = gathered.evidence
    np.testing.assert_allclose(
        some(evidence.means(sums).alignment), sums.alignment.astype(np.float64) / 3
    )
    assert evidence.means(plain.evidence).alignment is None
    plain, gathered = (x._replace(evidence=x.evidence._replace(alignment=None)) for x in results)
    tiny.assert_same_bits(gathered, plain)


def test_alignment_of_several_labels_is_refused():
    with pytest.raises(ConfigError, match="one label per image, and digits has several"):
        build(config(noise="none", example_alignment=True), num_train=32, multi_label=True)


def test_the_end_of_an_epoch_is_a_visit_of_the_held_out_examples():
    of = config(held_out=0.1, example_alignment=True)
    program = build(of, num_train=32, num_held_out=5)
    state = program.init(KEY)
    batch = raw()._replace(indices=np.arange(32, dtype=np.int32).reshape(4, 8))
    labels = np.array([0, 1, 2, 3, 4], np.int32)
    scores = jax.nn.log_softmax(jax.random.normal(KEY, (5, CLASSES)) * 3)
    for _ in range(2):
        state = program.step(state, jax.device_put(batch), KEY)
        state = program.new_epoch(state, Measured(np.array(True), labels, scores))
    gathered = jax.device_get(state.evidence)
    loss, margin, agreed = in_numpy(scores, labels)
    np.testing.assert_array_equal(gathered.visits, 2)
    np.testing.assert_allclose(gathered.loss[32:], 2 * loss, rtol=1e-5)
    np.testing.assert_allclose(gathered.margin[32:], 2 * margin, rtol=1e-5)
    np.testing.assert_array_equal(gathered.agreed[32:], 2 * agreed)
    alignment = some(evidence.means(gathered).alignment)
    assert np.isnan(alignment[32:]).all()
    assert np.isfinite(alignment[:32]).all()


def test_several_labels_have_no_evidence():
    program = build(config(noise="none"), num_train=32, multi_label=True)
    assert jax.eval_shape(program.init, KEY).evidence is None
    shape = jax.eval_shape(build(config(), num_train=32).init, KEY).evidence.margin.shape
    assert shape == (32,)
    assert CLASSES == 10  # of one label each


def test_a_run_visits_what_its_sampler_draws(tmp_path):
    of = tiny.config(noise="symmetric", noise_rate=0.25)
    trainer.train(of, tmp_path, tiny.options())
    problem, _ = tiny.build(of)
    gathered = jax.device_get(tiny.final_state(tmp_path, of).evidence)
    drawn = np.concatenate([problem.order.epoch(epoch).ravel() for epoch in range(of.epochs)])
    np.testing.assert_array_equal(gathered.visits, np.bincount(drawn, minlength=160))
    lines = read_metrics(tmp_path)
    per_epoch = 4 * of.k * of.b
    losses = sum(line["loss"] for line in lines) * per_epoch
    np.testing.assert_allclose(gathered.loss.sum(), losses, rtol=1e-4)
    agreed = sum(line["running_given"] for line in lines) * per_epoch
    assert gathered.agreed.sum() == round(agreed)
