"""Augmentation on the device, one example at a time.

Every operation maps ``(key, image [h, w, c])`` to an image whose shape is known statically, so
that it can be mapped over a batch and jitted::

    preset = augment.preset("inception", dataset.image_shape, dataset.max_value)
    keys = jax.random.split(key, (k, b))
    images = jax.vmap(jax.vmap(preset.train))(keys, images)     # [k, b, *preset.shape]

dm-pix does what it has an operation for; crops of random area and their scaling are `jax.image`'s.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import dm_pix
import jax
import jax.numpy as jnp

Transform = Callable[[jax.Array, jax.Array], jax.Array]

pix: Any = dm_pix  # declares results that may be NumPy arrays, which they never are

# Means and standard deviations of the channels of the training set, for pixels in [0, 1].
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True)
class Preset:
    """What is done to images before the network sees them.

    Attributes:
        name: One of `PRESETS`.
        shape: ``(h', w', c)`` of what all three functions make of an image.
        train: ``(key, image [h, w, c])`` to ``float32 [h', w', c]``, for training.
        evaluate: The same for evaluation; does not depend on the key.
        views: ``(key, image)`` to ``float32 [10, h', w', c]``, ten crops whose predictions are
            averaged; None where the preset has no such protocol.
    """

    name: str
    shape: tuple[int, int, int]
    train: Transform
    evaluate: Transform
    views: Transform | None = None


def preset(
    name: str, image_shape: tuple[int, int, int], max_value: int = 255, size: int | None = None
) -> Preset:
    """Makes the preset of the given name for images of the given shape.

    - none: pixels scaled to [0, 1].
    - standardize: standardised, at their own size.
    - cifarnet: centre crop 28, standardised, in training too. "We do not use data augmentation
      for CifarNet" (section 5.1); crop and standardisation are those of Zhang et al.
    - inception: padded by 4, random crop 29, flip, brightness ± 63/255, contrast 0.2 to 1.8,
      standardised; in evaluation centre crop 29, standardised. As in the authors' code.
    - preactresnet: padded by 4, random crop of the image's size, flip, normalised; in evaluation
      normalised. The recipe of Zhang et al. (2018), mixup.
    - imagenet: random crop 227, flip, normalised; in evaluation the centre crop. Views: the
      corners and the centre, flipped and not.
    - voc: a crop of 30% to 100% of the area, scaled to 227, normalised; in evaluation the whole
      image. Views: ten random crops (section 5.4).

    "Standardised" is per image (`standardize`); "normalised" subtracts the mean of each channel
    over the data set and divides by its standard deviation: CIFAR-10's for preactresnet,
    ImageNet's for imagenet and voc. Images with one channel get the average of the three.

    Args:
        name: One of `PRESETS`.
        image_shape: ``(h, w, c)`` of the images.
        max_value: The largest possible pixel value.
        size: Another crop size than the preset's, for all but none, standardize and preactresnet;
            224 for ResNet-50.

    Raises:
        ValueError: if the name is unknown (lists the known ones), the images are too small for
            the crop, or `size` does not apply.
    """
    if name not in _MAKERS:
        raise ValueError(f"unknown augmentation {name!r}; known: {', '.join(PRESETS)}")
    make, default_size, padding = _MAKERS[name]
    if default_size is None and size is not None:
        raise ValueError(f"augmentation {name!r} keeps the size of the images: no size to set")
    size = size or default_size or 0
    height, width, channels = image_shape
    if name in ("cifarnet", "inception", "imagenet") and min(height, width) + 2 * padding < size:
        raise ValueError(
            f"augmentation {name!r} crops to {size}x{size}: images of {height}x{width} are too "
            "small"
        )
    shape = (size, size, channels) if size else image_shape
    made = make(shape)

    def scaled(transform: Transform) -> Transform:
        def apply(key: jax.Array, image: jax.Array) -> jax.Array:
            return transform(key, image.astype(jnp.float32) / max_value)

        return apply

    return Preset(name, shape, *(scaled(transform) for transform in made))


def normalization(name: str, max_value: int = 255) -> dict[str, Any]:
    """What a preset's evaluation does to an image, in this order, as plain data.

    Args:
        name: One of `PRESETS`.
        max_value: The largest possible pixel value.

    Returns:
        ``crop``, the side of the central square (rounded to the lower right; zeros around a
        smaller image), or ``scale_to``, the side of the square that the image is scaled to;
        ``divide_by``, for pixels in [0, 1];
        ``standardize_each_image``, or ``mean`` and ``std`` of the channels, less the one and
        divided by the other (an image of one channel: their averages). What is not done is left
        out.
    """
    size = _MAKERS[name][1]
    steps: dict[str, Any] = {}
    if size is not None:
        steps["scale_to" if name == "voc" else "crop"] = size
    steps["divide_by"] = max_value
    if name in _STATISTICS:
        steps["mean"], steps["std"] = map(list, _STATISTICS[name])
    elif name != "none":
        steps["standardize_each_image"] = True
    return steps


def pad_and_crop(key: jax.Array, image: jax.Array, padding: int, size: tuple[int, int]):
    """Pads each side by `padding` zeros and takes a random crop: ``[*size, c]``."""
    height, width, channels = image.shape
    padded = pix.pad_to_size(image, height + 2 * padding, width + 2 * padding)
    return pix.random_crop(key, padded, (*size, channels))


def standardize(image: jax.Array) -> jax.Array:
    """Subtracts the mean and divides by max(standard deviation, 1/sqrt(number of values)).

    TensorFlow's `per_image_standardization`; the lower bound is for uniform images.
    """
    return (image - image.mean()) / jnp.maximum(image.std(), image.size**-0.5)


def area_crop(
    key: jax.Array, image: jax.Array, size: int, smallest: float = 0.3, largest: float = 1.0
) -> jax.Array:
    """Takes a crop of a random share of the area, at a random place, and scales it.

    The share is uniform in [smallest, largest] and the crop has the aspect ratio of the image.
    Scaling is bilinear, averaging where it shrinks.

    Args:
        key: A random key.
        image: ``float32 [h, w, c]``.
        size: Height and width of the result.
        smallest: The least share of the area, above 0.
        largest: The greatest, at most 1.

    Returns:
        ``float32 [size, size, c]``.
    """
    if not 0 < smallest <= largest <= 1:
        raise ValueError(f"shares of the area must be 0 < {smallest} <= {largest} <= 1")
    area_key, place_key = jax.random.split(key)
    side = jnp.sqrt(jax.random.uniform(area_key, (), minval=smallest, maxval=largest))
    extent = jnp.array(image.shape[:2], jnp.float32)
    corner = jax.random.uniform(place_key, (2,)) * (1 - side) * extent
    scale = size / (side * extent)
    return jax.image.scale_and_translate(
        image,
        (size, size, image.shape[2]),
        spatial_dims=(0, 1),
        scale=scale,
        translation=-corner * scale,
        method="linear",
    )


def ten_crop(image: jax.Array, size: int) -> jax.Array:
    """The four corners and the centre, and the same flipped: ``[10, size, size, c]``."""
    height, width, _ = image.shape
    bottom, right = height - size, width - size
    corners = ((0, 0), (0, right), (bottom, 0), (bottom, right))
    crops = [image[y : y + size, x : x + size] for y, x in corners]
    crops = jnp.stack([*crops, pix.center_crop(image, size, size)])
    return jnp.concatenate([crops, jnp.flip(crops, 2)])


def mixup(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    alpha: float,
    *,
    per_batch: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mixes each example of a mini-batch with another of the same mini-batch (Zhang et al., 2018).

    λ ~ Beta(α, α); the loss of the mixed images is λ·loss(labels) + (1 - λ)·loss(partner_labels).

    Args:
        key: A random key.
        images: ``float [b, h, w, c]``.
        labels: ``[b, ...]``, class numbers or one-hot.
        alpha: α, positive; 1 in the paper's comparison.
        per_batch: One λ for the mini-batch, as in that comparison, or one per example.

    Returns:
        ``(mixed images, partner_labels, λ)``, λ of shape ``[]`` or ``[b]``.

    Raises:
        ValueError: if `alpha` is not positive.
    """
    if not alpha > 0:
        raise ValueError(f"mixup needs a positive alpha, got {alpha}")
    lam_key, partner_key = jax.random.split(key)
    lam = jax.random.beta(lam_key, alpha, alpha, () if per_batch else images.shape[:1])
    partners = jax.random.permutation(partner_key, images.shape[0])
    weight = lam.astype(images.dtype).reshape(-1, 1, 1, 1)
    return weight * images + (1 - weight) * images[partners], labels[partners], lam


def _normalize(image: jax.Array, statistics: tuple[tuple[float, ...], tuple[float, ...]]):
    mean, std = (jnp.array(values, image.dtype).reshape(1, 1, 3) for values in statistics)
    if image.shape[2] != 3:
        mean, std = mean.mean(), std.mean()
    return (image - mean) / std


def _keep(key: jax.Array, image: jax.Array) -> jax.Array:
    del key
    return image


def _none(shape: tuple[int, int, int]) -> tuple[Transform, ...]:
    del shape
    return _keep, _keep


def _standardize(shape: tuple[int, int, int]) -> tuple[Transform, ...]:
    del shape

    def both(key: jax.Array, image: jax.Array) -> jax.Array:
        del key
        return standardize(image)

    return both, both


def _cifarnet(shape: tuple[int, int, int]) -> tuple[Transform, ...]:
    def both(key: jax.Array, image: jax.Array) -> jax.Array:
        del key
        return standardize(pix.resize_with_crop_or_pad(image, *shape[:2]))

    return both, both


def _inception(shape: tuple[int, int, int]) -> tuple[Transform, ...]:
    def train(key: jax.Array, image: jax.Array) -> jax.Array:
        crop, flip, brightness, contrast = jax.random.split(key, 4)
        image = pad_and_crop(crop, image, 4, shape[:2])
        image = pix.random_flip_left_right(flip, image)
        image = pix.random_brightness(brightness, image, 63 / 255)
        image = pix.random_contrast(contrast, image, 0.2, 1.8)
        return standardize(image)

    return train, _cifarnet(shape)[1]


def _preactresnet(shape: tuple[int, int, int]) -> tuple[Transform, ...]:
    def train(key: jax.Array, image: jax.Array) -> jax.Array:
        crop, flip = jax.random.split(key)
        image = pad_and_crop(crop, image, 4, shape[:2])
        return _normalize(pix.random_flip_left_right(flip, image), _CIFAR10)

    def evaluate(key: jax.Array, image: jax.Array) -> jax.Array:
        del key
        return _normalize(image, _CIFAR10)

    return train, evaluate


def _imagenet(shape: tuple[int, int, int]) -> tuple[Transform, ...]:
    def train(key: jax.Array, image: jax.Array) -> jax.Array:
        crop, flip = jax.random.split(key)
        image = pad_and_crop(crop, image, 0, shape[:2])
        return _normalize(pix.random_flip_left_right(flip, image), _IMAGENET)

    def evaluate(key: jax.Array, image: jax.Array) -> jax.Array:
        del key
        return _normalize(pix.center_crop(image, *shape[:2]), _IMAGENET)

    def views(key: jax.Array, image: jax.Array) -> jax.Array:
        del key
        return ten_crop(_normalize(image, _IMAGENET), shape[0])

    return train, evaluate, views


def _voc(shape: tuple[int, int, int]) -> tuple[Transform, ...]:
    def train(key: jax.Array, image: jax.Array) -> jax.Array:
        return _normalize(area_crop(key, image, shape[0]), _IMAGENET)

    def evaluate(key: jax.Array, image: jax.Array) -> jax.Array:
        del key
        return _normalize(jax.image.resize(image, shape, "linear"), _IMAGENET)

    def views(key: jax.Array, image: jax.Array) -> jax.Array:
        return jax.vmap(train, in_axes=(0, None))(jax.random.split(key, 10), image)

    return train, evaluate, views


# name: how it is made, the size of its crops, how far it pads
_MAKERS: dict[str, tuple[Callable[..., tuple[Transform, ...]], int | None, int]] = {
    "none": (_none, None, 0),
    "standardize": (_standardize, None, 0),
    "cifarnet": (_cifarnet, 28, 0),
    "inception": (_inception, 29, 4),
    "preactresnet": (_preactresnet, None, 4),
    "imagenet": (_imagenet, 227, 0),
    "voc": (_voc, 227, 0),
}

# Of the presets that normalise by a data set's statistics rather than by each image's own.
_STATISTICS = {"preactresnet": _CIFAR10, "imagenet": _IMAGENET, "voc": _IMAGENET}

PRESETS = tuple(_MAKERS)
"""The names that `preset` knows."""
