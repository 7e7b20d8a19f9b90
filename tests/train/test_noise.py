import numpy as np
import pytest

from train import noise

COUNTS = [100, 57, 30, 10]


@pytest.fixture(scope="module")
def labels():
    return np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))


@pytest.mark.parametrize("rate", [0.0, 0.29, 0.5, 1.0])
def test_symmetric_flips_exactly_so_many_of_each_class(labels, rate):
    given = noise.symmetric(labels, rate, 4, seed=1)
    wrong = np.bincount(labels[given != labels], minlength=4)
    expected = {0.0: [0] * 4, 0.29: [29, 16, 8, 2], 0.5: [50, 28, 15, 5], 1.0: COUNTS}[rate]
    np.testing.assert_array_equal(wrong, expected)
    assert given.dtype == np.int32


def test_symmetric_is_uniform_over_the_other_classes():
    given = noise.symmetric(np.full(30_000, 2), 1.0, 4, seed=0)
    counts = np.bincount(given, minlength=4)
    assert counts[2] == 0
    assert abs(counts[[0, 1, 3]] - 10_000).max() < 5 * np.sqrt(30_000 * (1 / 3) * (2 / 3))


def test_uniform_may_redraw_the_true_class():
    true = np.repeat(np.arange(10), 1000)
    given = noise.uniform(true, 0.5, 10, seed=0)
    assert abs((given != true).mean() - 0.45) < 0.01
    redrawn = noise.uniform(true, 1.0, 10, seed=0)
    assert abs(np.bincount(redrawn, minlength=10) - 1000).max() < 5 * 30


def test_pair_flip_goes_to_the_next_class(labels):
    given = noise.pair_flip(labels, 0.3, 4, seed=0)
    changed = given != labels
    np.testing.assert_array_equal(given[changed], (labels[changed] + 1) % 4)
    np.testing.assert_array_equal(np.bincount(labels[changed]), [30, 17, 9, 3])


@pytest.mark.parametrize("kind", ["symmetric", "uniform", "pair_flip"])
def test_seeded_and_without_side_effects(labels, kind):
    before = labels.copy()
    given = noise.corrupt(kind, labels, 0.5, 4, 7)
    np.testing.assert_array_equal(given, noise.corrupt(kind, labels, 0.5, 4, 7))
    np.testing.assert_array_equal(labels, before)
    assert not np.array_equal(given, noise.corrupt(kind, labels, 0.5, 4, 8))


def test_none_copies(labels):
    given = noise.corrupt("none", labels, 0.5, 4, 0)
    np.testing.assert_array_equal(given, labels)
    assert given is not labels


def test_noise_is_the_same_for_good():
    true = np.arange(12) % 3
    np.testing.assert_array_equal(
        noise.symmetric(true, 0.5, 3, seed=0), [0, 0, 1, 0, 0, 2, 2, 1, 2, 2, 1, 1]
    )


def test_model_made_takes_the_predictions(labels):
    predicted = (labels + 1) % 4
    np.testing.assert_array_equal(noise.model_made(labels, predicted, 4), predicted)
    with pytest.raises(ValueError, match="196 given labels for 197 training examples"):
        noise.model_made(labels, predicted[1:], 4)
    with pytest.raises(ValueError, match=r"predicted labels must lie in 0\.\.3, got 0\.\.4"):
        noise.model_made(labels, np.minimum(predicted * 2, 4), 4)


def test_file_round_trip(tmp_path, labels):
    given = noise.symmetric(labels, 0.5, 4, seed=1)
    path = tmp_path / "noise.npz"
    noise.save(path, given, labels)
    for got, expected in zip(noise.load(path), (given, labels), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == np.int32
    np.testing.assert_array_equal(noise.from_file(path, labels, 4), given)


def test_file_for_other_data_is_refused(tmp_path, labels):
    path = tmp_path / "noise.npz"
    noise.save(path, labels, labels)
    with pytest.raises(ValueError, match="is for other data"):
        noise.from_file(path, labels[::-1], 4)
    np.savez(path, labels=labels)
    with pytest.raises(ValueError, match=r"holds \['labels'\], not the array `given`"):
        noise.from_file(path, labels, 4)
    with pytest.raises(ValueError, match="not `given` and `true`"):
        noise.load(path)
    np.savez(path, given=labels[1:])
    with pytest.raises(ValueError, match="196 given labels for 197"):
        noise.from_file(path, labels, 4)
    np.savez(path, given=labels + 4)
    with pytest.raises(ValueError, match=r"the given labels of .* must lie in"):
        noise.from_file(path, labels, 4)
    path.write_bytes(b"not an archive")
    with pytest.raises(ValueError, match="is not a file of NumPy arrays"):
        noise.load(path)
    with pytest.raises(FileNotFoundError):
        noise.from_file(tmp_path / "absent.npz", labels, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y: noise.corrupt("asymmetric", y, 0.5, 4, 0), "known: none, symmetric, uniform, p"),
        (lambda y: noise.symmetric(y, 1.1, 4, 0), r"must lie in \[0, 1\], got 1.1"),
        (lambda y: noise.symmetric(y, -0.1, 4, 0), r"must lie in \[0, 1\], got -0.1"),
        (lambda y: noise.symmetric(y, float("nan"), 4, 0), r"must lie in \[0, 1\], got nan"),
        (lambda y: noise.symmetric(y, 0.5, 3, 0), r"must lie in 0\.\.2, got 0\.\.3"),
        (lambda y: noise.symmetric(y * 0, 0.5, 1, 0), "at least 2 classes"),
        (lambda y: noise.symmetric(np.eye(4, dtype=int)[y], 0.5, 4, 0), "one label per example"),
    ],
)
def test_bad_input(labels, call, message):
    with pytest.raises(ValueError, match=message):
        call(labels)


@pytest.fixture(scope="module")
def images():
    # Every pixel of every image is told apart by its first channel; the second is its negative.
    first = np.arange(3 * 20, dtype=np.uint8).reshape(3, 4, 5, 1)
    return np.concatenate([first, 255 - first], -1)


def test_random_pixels_differ_per_image_and_stay(images):
    permuted = noise.random_pixels(images, np.array([0, 1, 2]), seed=0)
    assert permuted.shape == images.shape
    assert permuted.dtype == np.uint8
    np.testing.assert_array_equal(permuted[..., 1], 255 - permuted[..., 0])  # colours stay whole
    orders = permuted[..., 0].reshape(3, 20) - 20 * np.arange(3)[:, None]
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(20), (3, 1)))
    assert len({tuple(order) for order in orders.tolist()}) == 3
    # the same image alone, later, in another order: the same permutation
    np.testing.assert_array_equal(
        noise.random_pixels(images[[2, 0]], np.array([2, 0]), seed=0), permuted[[2, 0]]
    )
    assert not np.array_equal(noise.random_pixels(images, np.arange(3), seed=1), permuted)
    with pytest.raises(ValueError, match="3 images, but indices of shape"):
        noise.random_pixels(images, np.arange(2), seed=0)


def test_shuffled_pixels_are_alike(images):
    shuffled = noise.shuffled_pixels(images, seed=0)
    orders = shuffled[..., 0].reshape(3, 20) - 20 * np.arange(3)[:, None]
    np.testing.assert_array_equal(orders, np.tile(orders[:1], (3, 1)))
    np.testing.assert_array_equal(np.sort(orders[0]), np.arange(20))
    assert not np.array_equal(orders[0], np.arange(20))
