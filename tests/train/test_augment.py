import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import augment

SIZES = {"imagenet": (256, 256, 3), "voc": (240, 260, 3)}


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


def standardized(x):
    x = np.asarray(x, np.float64)
    return (x - x.mean()) / max(x.std(), 1 / np.sqrt(x.size))


@pytest.mark.parametrize("name", augment.PRESETS)
def test_shapes_are_static_and_batches_map(name):
    shape = SIZES.get(name, (32, 32, 3))
    preset = augment.preset(name, shape)
    images = np.random.default_rng(1).integers(0, 256, (2, *shape), np.uint8)
    keys = jax.random.split(jax.random.key(0), 2)
    for transform in (preset.train, preset.evaluate):
        mapped = jax.jit(jax.vmap(transform))
        out = mapped(keys, images)
        assert out.shape == (2, *preset.shape)
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(mapped(keys, images.astype(np.float32)), out, atol=1e-4)
        # An example's result does not depend on the others.
        np.testing.assert_allclose(mapped(keys[::-1], images[::-1])[1], out[0], atol=1e-6)
    # out is evaluate's: the key does not matter
    np.testing.assert_array_equal(mapped(keys[::-1], images), out)
    assert (preset.views is not None) == (name in SIZES)
    if preset.views is not None:
        shape = jax.eval_shape(preset.views, keys[0], images[0]).shape
        assert shape == (10, *preset.shape)


@pytest.mark.parametrize(("name", "random"), [("none", False), ("cifarnet", False), ("voc", True)])
def test_randomness_comes_from_the_key_alone(name, random):
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    train = jax.jit(augment.preset(name, (40, 40, 3)).train)
    first, again, other = (train(jax.random.key(seed), image) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.array_equal(first, other) != random


def test_none_scales_by_the_largest_value():
    digit = jnp.array([[[0], [16]], [[8], [4]]], jnp.uint8)
    preset = augment.preset("none", (2, 2, 1), max_value=16)
    np.testing.assert_array_equal(
        preset.train(jax.random.key(0), digit), [[[0], [1]], [[0.5], [0.25]]]
    )


def test_cifarnet_is_the_standardized_centre(image):
    preset = augment.preset("cifarnet", image.shape)
    expected = standardized(image[2:30, 2:30] / 255)
    np.testing.assert_allclose(preset.train(jax.random.key(0), image), expected, atol=1e-5)
    np.testing.assert_allclose(preset.evaluate(jax.random.key(0), image), expected, atol=1e-5)


def test_standardize_keeps_the_size(image):
    preset = augment.preset("standardize", image.shape)
    expected = standardized(image / 255)
    np.testing.assert_allclose(preset.train(jax.random.key(0), image), expected, atol=1e-5)
    np.testing.assert_allclose(preset.evaluate(jax.random.key(0), image), expected, atol=1e-5)


def test_standardize_has_a_lower_bound(image):
    np.testing.assert_array_equal(augment.standardize(jnp.full((4, 4, 3), 0.5)), 0)
    faint = 0.5 + 1e-4 * (np.indices((4, 4, 3)).sum(0) % 2)
    # 48 values: divided by 1/sqrt(48), not by their deviation of 5e-5
    np.testing.assert_allclose(
        augment.standardize(jnp.asarray(faint, jnp.float32)),
        (faint - faint.mean()) * np.sqrt(48),
        atol=1e-6,
    )


def test_pad_and_crop_takes_every_window():
    image = jnp.arange(1, 10, dtype=jnp.float32).reshape(3, 3, 1)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    windows = {padded[y : y + 3, x : x + 3].tobytes() for y in range(3) for x in range(3)}
    keys = jax.random.split(jax.random.key(0), 200)
    crops = jax.jit(jax.vmap(lambda key: augment.pad_and_crop(key, image, 1, (3, 3))))(keys)
    assert {np.asarray(crop).tobytes() for crop in crops} == windows


def test_inception_does_what_it_says_in_that_order(image):
    out = augment.preset("inception", image.shape).train(jax.random.key(5), image)
    # The same draws, applied by hand.
    crop, flip, brightness, contrast = jax.random.split(jax.random.key(5), 4)
    offsets = [
        int(jax.random.randint(k, (), 0, n))
        for k, n in zip(jax.random.split(crop, 3), (12, 12, 1), strict=True)
    ]
    x = np.pad(image / 255, ((4, 4), (4, 4), (0, 0)))
    x = x[offsets[0] : offsets[0] + 29, offsets[1] : offsets[1] + 29]
    if jax.random.bernoulli(flip):
        x = x[:, ::-1]
    x = x + float(jax.random.uniform(brightness, minval=-63 / 255, maxval=63 / 255))
    mean = x.mean((0, 1))
    x = (x - mean) * float(jax.random.uniform(contrast, minval=0.2, maxval=1.8)) + mean
    np.testing.assert_allclose(out, standardized(x), atol=2e-5)


def test_inception_evaluates_small_images_too():
    out = augment.preset("inception", (28, 28, 1)).evaluate(
        jax.random.key(0), jnp.full((28, 28, 1), 9, jnp.uint8)
    )
    assert out.shape == (29, 29, 1)


def test_preactresnet_crops_flips_and_normalizes(image):
    preset = augment.preset("preactresnet", image.shape)
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    np.testing.assert_allclose(
        preset.evaluate(jax.random.key(0), image), (image / 255 - mean) / std, atol=1e-5
    )
    padded = (np.pad(image / 255, ((4, 4), (4, 4), (0, 0))) - mean) / std
    windows = [padded[y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    train = jax.jit(preset.train)
    flipped = set()
    for seed in range(6):
        out = train(jax.random.key(seed), image)
        matches = [np.allclose(out, w, atol=1e-5) for w in windows]
        mirrored = [np.allclose(out, w[:, ::-1], atol=1e-5) for w in windows]
        assert sum(matches) + sum(mirrored) == 1
        flipped.add(any(mirrored))
    assert flipped == {True, False}


def test_one_channel_gets_the_average_statistics():
    grey = jnp.full((4, 4, 1), 255, jnp.uint8)
    out = augment.preset("preactresnet", (4, 4, 1)).evaluate(jax.random.key(0), grey)
    mean, std = np.mean([0.4914, 0.4822, 0.4465]), np.mean([0.2470, 0.2435, 0.2616])
    np.testing.assert_allclose(out, (1 - mean) / std, rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", augment.PRESETS)
def test_normalization_in_words_is_what_evaluation_does(name, channels):
    shape = (*SIZES.get(name, (32, 32, 3))[:2], channels)
    image = np.random.default_rng(0).integers(0, 201, shape, np.uint8)
    steps = augment.normalization(name, 200)
    x = np.asarray(image, np.float64)
    for step, value in steps.items():
        if step == "crop":
            top, left = ((side - value + 1) // 2 for side in x.shape[:2])
            x = x[top : top + value, left : left + value]
        elif step == "scale_to":
            x = np.asarray(jax.image.resize(x, (value, value, channels), "linear"))
        elif step == "divide_by":
            x = x / value
        elif step == "standardize_each_image":
            x = standardized(x)
        elif step == "mean":
            mean, std = np.array(value), np.array(steps["std"])
            if channels == 1:
                mean, std = mean.mean(), std.mean()
            x = (x - mean) / std
        else:
            assert step == "std"
    expected = augment.preset(name, shape, 200).evaluate(jax.random.key(0), jnp.asarray(image))
    np.testing.assert_allclose(x, expected, atol=1e-4)


def test_ten_crop():
    image = np.arange(5 * 6).reshape(5, 6, 1).astype(np.float32)
    crops = augment.ten_crop(jnp.asarray(image), 2)
    expected = [image[y : y + 2, x : x + 2] for y, x in ((0, 0), (0, 4), (3, 0), (3, 4), (1, 2))]
    np.testing.assert_array_equal(crops[:5], expected)
    np.testing.assert_array_equal(crops[5:], np.array(expected)[:, :, ::-1])


def test_area_crop_covers_its_share():
    # The two channels hold the coordinates of each pixel's centre, as shares of the sides.
    height, width, size = 8, 12, 32
    ys, xs = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    image = jnp.asarray(np.stack(np.meshgrid(ys, xs, indexing="ij"), -1), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 400)
    crops = np.asarray(jax.jit(jax.vmap(lambda key: augment.area_crop(key, image, size)))(keys))
    # Away from the border, where the image ends, the crop is an exact ramp.
    first, last = crops[:, 8, 8], crops[:, 23, 23]
    sides = (last - first) / 15 * size
    np.testing.assert_allclose(sides[:, 0], sides[:, 1], atol=1e-3)  # keeps the aspect ratio
    share = sides.prod(1)
    assert 0.299 < share.min() < 0.32
    assert 0.98 < share.max() < 1.001
    assert abs(share.mean() - 0.65) < 5 * 0.7 / np.sqrt(12 * 400)
    corner = first - 8.5 / size * sides
    assert corner.min() > -1e-3
    assert (corner + sides).max() < 1 + 1e-3
    free = corner / np.maximum(1 - sides, 1e-9)  # uniform, where there is room
    roomy = share < 0.8
    assert abs(free[roomy].mean() - 0.5) < 0.06


def test_area_crop_of_everything_is_a_resize():
    image = jnp.asarray(np.random.default_rng(0).random((12, 18, 3)), jnp.float32)
    np.testing.assert_allclose(
        augment.area_crop(jax.random.key(0), image, 6, 1.0, 1.0),
        jax.image.resize(image, (6, 6, 3), "linear"),
        atol=1e-6,
    )


@pytest.mark.parametrize("per_batch", [True, False])
def test_mixup(per_batch):
    n = 500
    images = np.random.default_rng(0).random((n, 2, 1, 1)).astype(np.float32)
    labels = np.arange(n)
    mixed, partners, lam = jax.jit(augment.mixup, static_argnames=("alpha", "per_batch"))(
        jax.random.key(0), images, labels, alpha=0.2, per_batch=per_batch
    )
    np.testing.assert_array_equal(np.sort(partners), labels)
    assert (partners != labels).mean() > 0.9
    weight = np.broadcast_to(lam, n)[:, None, None, None]
    np.testing.assert_allclose(mixed, weight * images + (1 - weight) * images[partners], atol=1e-6)
    if per_batch:
        assert lam.shape == ()
    else:  # Beta(α, α) has mean 1/2 and variance 1/(4(2α + 1))
        assert lam.shape == (n,)
        assert abs(float(lam.mean()) - 0.5) < 0.08
        assert abs(float(lam.var()) - 1 / 5.6) < 0.02


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: augment.preset("alexnet", (32, 32, 3)), "known: none, standardize, cifarnet, inc"),
        (lambda: augment.preset("cifarnet", (8, 8, 1)), "crops to 28x28: images of 8x8 are too sm"),
        (lambda: augment.preset("inception", (20, 32, 1)), "images of 20x32 are too small"),
        (lambda: augment.preset("none", (32, 32, 3), size=8), "keeps the size of the images"),
        (lambda: augment.mixup(jax.random.key(0), jnp.ones(1), jnp.ones(1), 0.0), "positive alpha"),
        (
            lambda: augment.area_crop(jax.random.key(0), jnp.ones((2, 2, 1)), 2, 0.0),
            "shares of the area",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_another_size():
    assert augment.preset("imagenet", (256, 256, 3), size=224).shape == (224, 224, 3)
