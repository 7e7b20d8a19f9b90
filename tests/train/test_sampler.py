import pickle
import time

import numpy as np
import pytest

from train import sampler

K, B = 4, 5


@pytest.fixture(scope="module")
def labels():
    # Class sizes that k does not divide: 97, 50, 33, 20.
    return np.random.default_rng(1).permutation(np.repeat([0, 1, 2, 5], [97, 50, 33, 20]))


def test_stratified_rows_have_equal_labels_position_by_position(labels):
    draws = sampler.stratified(labels, K, B, seed=3)
    # 24 + 12 + 8 + 5 tuples of 4, five tuples a step
    assert draws.steps_per_epoch == 49 // B
    for epoch in range(5):
        indices = draws.epoch(epoch)
        assert indices.shape == (9, K, B)
        assert indices.dtype == np.int32
        np.testing.assert_array_equal(labels[indices], labels[indices][:, :1].repeat(K, axis=1))
        assert sampler.label_distance(labels, indices) == 0
        assert len(np.unique(indices)) == indices.size  # at most once an epoch


@pytest.mark.parametrize("together", [1, 2, 16])
def test_pure_in_seed_epoch_step(labels, together, monkeypatch):
    draws = sampler.stratified(labels, K, B, seed=3)
    expected = [draws.batch(e, s).copy() for e in range(3) for s in range(9)]
    monkeypatch.setattr(sampler, "_TOGETHER", together * draws.epoch(0).size)
    again = sampler.stratified(labels, K, B, seed=3)
    for e, s in reversed([(e, s) for e in range(3) for s in range(9)]):
        np.testing.assert_array_equal(again.batch(e, s), expected[e * 9 + s])
    other = sampler.stratified(labels, K, B, seed=4)
    assert not np.array_equal(other.epoch(0), draws.epoch(0))
    assert not np.array_equal(draws.epoch(0), draws.epoch(1))


def test_order_is_fixed_for_good():
    # Runs resumed with another version of this package must go on with the same batches.
    draws = sampler.stratified(np.arange(12) % 2, 3, 2, seed=0)
    np.testing.assert_array_equal(
        draws.epoch(1), [[[3, 6], [9, 8], [5, 2]], [[7, 0], [1, 10], [11, 4]]]
    )


@pytest.mark.parametrize("make", ["stratified", "random", "separate", "multi_label"])
def test_no_example_is_systematically_left_out(labels, make):
    n, epochs = len(labels), 60
    if make == "stratified":
        draws = sampler.stratified(labels, K, B, seed=0)
    elif make == "random":
        draws = sampler.random(n, 7, 3, seed=0)
    elif make == "separate":
        draws = sampler.separate_validation(
            labels, K, B, sampler.hold_out(labels, 0.2, seed=0), seed=0
        )
    else:
        draws = sampler.multi_label(np.eye(6, dtype=int)[labels], 7, 3, seed=0)
    visits = np.bincount(np.concatenate([draws.epoch(e).ravel() for e in range(epochs)]))
    assert visits.min() > 0.5 * epochs
    assert len(visits) == n


def test_leftovers_are_spread_evenly():
    # 10 examples in tuples of 4: each is visited with probability 0.8 an epoch.
    draws = sampler.stratified(np.zeros(10, int), 4, 1, seed=0)
    visits = np.bincount(np.concatenate([draws.epoch(e).ravel() for e in range(1000)]))
    assert abs(visits - 800).max() < 5 * np.sqrt(1000 * 0.8 * 0.2)


def test_random_is_not_stratified_and_serves_plain_sgd(labels):
    draws = sampler.random(len(labels), K, B, seed=0)
    indices = draws.epoch(0)
    assert indices.shape == (10, K, B)
    assert np.unique(indices).size == 200
    assert sampler.label_distance(labels, indices) > 0.1
    assert sampler.random(len(labels), 1, 64, seed=0).epoch(0).shape == (3, 1, 64)


def test_separate_validation(labels):
    validation = sampler.hold_out(labels, 0.1, seed=0)
    np.testing.assert_array_equal(
        np.unique(labels[validation], return_counts=True)[1], [10, 5, 3, 2]
    )
    draws = sampler.separate_validation(labels, K, B, validation, seed=2)
    # 87 // 3 + 45 // 3 + 30 // 3 + 18 // 3 tuples
    assert draws.steps_per_epoch == 60 // B
    for epoch in range(3):
        indices = draws.epoch(epoch)
        assert np.isin(indices[:, 0], validation).all()
        assert not np.isin(indices[:, 1:], validation).any()
        assert np.unique(indices[:, 1:]).size == indices[:, 1:].size
        assert sampler.label_distance(labels, indices) == 0
        # 29 tuples ask the 10 validation examples of class 0: each served 2 or 3 times
        served = np.bincount(indices[:, 0].ravel(), minlength=200)[validation]
        np.testing.assert_array_equal(np.unique(served[labels[validation] == 0]), [2, 3])


def test_several_validation_batches(labels):
    validation = sampler.hold_out(labels, 0.4, seed=0)
    indices = sampler.separate_validation(labels, K, B, validation, seed=2, num_validation=2).epoch(
        0
    )
    assert np.isin(indices[:, :2], validation).all()
    assert not np.isin(indices[:, 2:], validation).any()
    assert sampler.label_distance(labels, indices) == 0


def test_clean_validation_without_a_class_warns_by_name(labels):
    validation = np.flatnonzero(labels != 5)[:60]
    with pytest.warns(
        UserWarning, match=r"class five \(20 examples\), which has no example in the"
    ):
        draws = sampler.separate_validation(
            labels, K, B, validation, seed=0, class_names=["zero", "one", "two", "", "", "five"]
        )
    assert not (labels[draws.epoch(0)] == 5).any()


def test_rare_class_warns_by_name(labels):
    with pytest.warns(
        UserWarning, match=r"class 2 \(33 examples\), 5 \(20 examples\), which has fe"
    ):
        draws = sampler.stratified(labels, 40, 2, seed=0)
    assert set(np.unique(labels[draws.epoch(0)])) <= {0, 1}


def voc_like(n=2000, seed=0):
    rng = np.random.default_rng(seed)
    hot = rng.random((n, 20)) < rng.uniform(0.02, 0.12, 20)
    hot[:, 14] |= rng.random(n) < 0.35
    hot[np.arange(n), rng.integers(0, 20, n)] |= ~hot.any(1)
    return hot.astype(np.int32)


def test_multi_label_neighbours_are_much_closer_than_random():
    hot = voc_like()
    near = sampler.multi_label(hot, 4, 16, seed=0)
    far = sampler.random(len(hot), 4, 16, seed=0)
    assert near.steps_per_epoch == far.steps_per_epoch == 500 // 16
    assert np.unique(near.epoch(0)).size == near.epoch(0).size
    assert not np.array_equal(near.epoch(0), near.epoch(1))
    distances = [sampler.label_distance(hot, s.epoch(0)) for s in (near, far)]
    assert distances[0] < 0.55 * distances[1]


def test_multi_label_is_exact_where_label_sets_repeat():
    hot = np.repeat(np.array([[1, 0, 1], [0, 1, 0]]), 8, axis=0)
    assert sampler.label_distance(hot, sampler.multi_label(hot, 4, 2, seed=0).epoch(0)) == 0


def test_label_distance_by_hand():
    labels = np.array([0, 0, 1, 1, 2])
    assert sampler.label_distance(labels, np.array([[0, 2], [1, 3]])) == 0
    assert sampler.label_distance(labels, np.array([[0, 1], [2, 3]])) == 1
    # against [0, 1]: [0, 1] differs in nothing, [1, 2] in half
    assert sampler.label_distance(labels, np.array([[[0, 2], [1, 3], [2, 4]]])) == 0.25
    hot = np.array([[1, 1, 0], [1, 0, 0]])
    assert sampler.label_distance(hot, np.array([[0], [1]])) == pytest.approx(1 / 3)


def separate(labels, k, validation):
    return sampler.separate_validation(labels, k, 1, np.array(validation), seed=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y: sampler.stratified(y, 1, 5, seed=0), "k must be at least 2, got 1; plain SGD"),
        (lambda y: sampler.stratified(y, 4, 0, seed=0), "b must be at least 1, got 0"),
        (lambda y: sampler.stratified(y, 4, 50, seed=0), "give 49 tuples .* at most 49"),
        (lambda y: sampler.stratified(np.eye(6)[y], 4, 5, seed=0), "multi-hot labels take"),
        (lambda y: sampler.stratified(y.astype(float), 4, 5, seed=0), "integers, got float64"),
        (lambda y: sampler.random(10, 4, 3, seed=0), "give 2 tuples of k=4 .* at most 2"),
        (lambda y: sampler.random(10, 11, 1, seed=0), "give 0 tuples of k=11 .* lower k"),
        (lambda y: sampler.hold_out(y, 1.0, seed=0), "between 0 and 1, got 1.0"),
        (lambda y: separate(y, 2, [200]), "0..199, got 200..200"),
        (lambda y: separate(y, 2, [1, 1]), "more than once"),
        (lambda y: separate(y, 2, []), "non-empty vector"),
        (lambda y: separate(y, 1, [0]), "k must be at least 2"),
        (lambda y: sampler.multi_label(y, 2, 1, seed=0), "multi-hot, 0 or 1"),
    ],
)
def test_bad_input(labels, call, message):
    with pytest.raises(ValueError, match=message):
        call(labels)


def test_step_beyond_the_epoch(labels):
    draws = sampler.stratified(labels, K, B, seed=0)
    with pytest.raises(IndexError, match=r"step 9 is not in 0\.\.8"):
        draws.batch(0, 9)
    with pytest.raises(ValueError, match="epoch must not be negative"):
        draws.epoch(-1)


def test_epochs_are_read_only_and_cheap():
    labels = np.random.default_rng(0).integers(0, 10, 50_000)
    draws = sampler.stratified(labels, 8, 8, seed=0)
    draws.epoch(0)
    took = []
    for epoch in range(1, 6):
        start = time.process_time()
        draws.epoch(epoch)
        took.append(time.process_time() - start)
    assert min(took) < 0.05
    assert draws.epoch(5) is draws.epoch(5)
    with pytest.raises(ValueError, match="read-only"):
        draws.epoch(5)[0] = 0
    assert len(pickle.dumps(draws.__getstate__()["_cached"])) < 10
