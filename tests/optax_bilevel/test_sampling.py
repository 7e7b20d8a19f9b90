"""Mini-batches with the same labels: position by position, each example once an epoch."""

import itertools
import warnings

import numpy as np
import pytest

from optax_bilevel import stratified_batches


def labels_of(seed=0, n=1000, classes=7):
    return np.random.default_rng(seed).integers(0, classes, n)


@pytest.mark.parametrize(("k", "b"), [(2, 1), (4, 8), (8, 16), (3, 50)])
def test_mini_batches_have_the_same_labels(k, b):
    labels = labels_of()
    for epoch in itertools.islice(stratified_batches(labels, k, b, seed=3), 3):
        steps = epoch.shape[0]
        assert (epoch.shape, epoch.dtype) == ((steps, k, b), np.int32)
        np.testing.assert_array_equal(labels[epoch], np.repeat(labels[epoch[:, :1]], k, axis=1))
        assert len(np.unique(epoch)) == epoch.size
        tuples = sum(np.sum(labels == label) // k for label in range(7))
        assert steps == tuples // b


def test_every_example_has_its_turn():
    """Those that no tuple or no step has room for are others in every epoch."""
    labels = labels_of(n=203)
    epochs = stratified_batches(labels, 4, 8, seed=0)
    seen = np.zeros(len(labels), int)
    for epoch in itertools.islice(epochs, 40):
        seen[epoch] += 1
    assert seen.min() > 10
    assert seen.max() <= 40


def test_positions_are_no_order_of_the_data():
    """The validation mini-batch, the first of every step, gets all examples alike."""
    labels = np.arange(400) % 2
    first = np.zeros(len(labels), int)
    for epoch in itertools.islice(stratified_batches(labels, 4, 10, seed=1), 200):
        first[epoch[:, 0]] += 1
    assert first.mean() == 50
    assert first.std() < 1.2 * np.sqrt(50 * 0.75)  # 200 draws with a chance of one in four


def test_an_epoch_is_a_function_of_seed_and_number():
    labels = labels_of()
    epochs = stratified_batches(labels, 4, 8, seed=5)
    given = [next(epochs) for _ in range(3)]
    again = stratified_batches(labels, 4, 8, seed=5)
    for number in (2, 0, 1):  # in any order
        np.testing.assert_array_equal(again[number], given[number])
    np.testing.assert_array_equal(next(again), given[0])  # asking by number does not move it
    assert not np.array_equal(given[0], given[1])
    assert not np.array_equal(given[0], stratified_batches(labels, 4, 8, seed=6)[0])
    with pytest.raises(IndexError, match="epochs count from 0, got -1"):
        epochs[-1]


def test_the_global_generator_is_left_alone():
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    next(stratified_batches(labels_of(), 4, 8, seed=0))
    assert np.random.rand() == expected


@pytest.mark.parametrize("make", [list, np.int64, np.uint8, np.int32])
def test_labels_of_any_integers(make):
    labels = make(np.repeat([3, 7, 200], 10))
    epoch = stratified_batches(labels, 5, 2, seed=0)[0]
    assert epoch.shape == (3, 5, 2)
    assert set(np.asarray(labels)[epoch].reshape(-1)) == {3, 7, 200}


def test_jax_labels():
    jnp = pytest.importorskip("jax.numpy")
    labels = labels_of(n=100)
    np.testing.assert_array_equal(
        stratified_batches(jnp.asarray(labels), 4, 2, seed=0)[0],
        stratified_batches(labels, 4, 2, seed=0)[0],
    )


def test_classes_that_are_too_small_are_named():
    labels = np.repeat([0, 1, 2, -5], [20, 3, 20, 1])
    with pytest.warns(UserWarning, match="fewer than k = 4 examples: -5, 1 are never visited"):
        epochs = stratified_batches(labels, 4, 5, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, not every epoch
        assert set(labels[next(epochs)].reshape(-1)) == {0, 2}


@pytest.mark.parametrize(
    ("labels", "k", "b", "message"),
    [
        (np.zeros((4, 2), int), 2, 1, r"a vector of integers, got shape \(4, 2\) of int64"),
        (np.zeros(4), 2, 1, r"a vector of integers, got shape \(4,\) of float64"),
        (["a", "b"], 2, 1, r"a vector of integers, got shape \(2,\) of <U1"),
        (np.zeros(4, int), 1, 1, "k must be an integer of at least 2, got 1"),
        (np.zeros(4, int), 2, 0, "b must be an integer of at least 1, got 0"),
        (np.zeros(9, int), 2, 5, "b = 5 groups of k = 2 examples .* the 9 labels make 4. Take a"),
        (np.arange(3), 2, 1, "make 0; classes with fewer than k = 2 examples: 0, 1, 2. Take a"),
        (np.zeros(0, int), 2, 1, "the 0 labels make 0. Take a smaller k or b"),
    ],
)
def test_errors(labels, k, b, message):
    with pytest.raises(ValueError, match=message):
        stratified_batches(labels, k, b, seed=0)


@pytest.mark.parametrize(("name", "value"), [("k", 2.0), ("b", 1.5), ("seed", -1)])
def test_what_is_no_count(name, value):
    options = {"k": 2, "b": 1, "seed": 0, name: value}
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least"):
        stratified_batches(labels_of(), **options)
