"""Layers that Flax does not have."""

import jax
import jax.numpy as jnp


def local_response_normalization(
    x: jax.Array, *, radius: int, bias: float, alpha: float, beta: float
) -> jax.Array:
    r"""Divides each activation by a power of the energy in the channels around it.

    With the sum over the channels i from c - radius to c + radius:

    .. math:: y_c = x_c\,/\,(\mathrm{bias} + \alpha\,\sum_i x_i^2)^\beta

    as in section 3.3 of Krizhevsky et al., "ImageNet Classification with Deep Convolutional
    Neural Networks" (2012), with the arguments of `tf.nn.lrn`. Caffe divides its alpha by the
    window 2·radius + 1; here α is applied as it is.

    Args:
        x: activations, [..., channels]; the sum is taken in float32.
        radius: channels to either side that count, fewer at the two ends.
        bias: added to the weighted sum of squares.
        alpha: weight of the sum of squares.
        beta: exponent.

    Returns:
        Normalised activations, shape and dtype of `x`.
    """
    x32 = x.astype(jnp.float32)
    ends = [(0, 0)] * (x.ndim - 1)
    energy = jax.lax.reduce_window(
        jnp.square(x32),
        0.0,
        jax.lax.add,
        window_dimensions=(1,) * (x.ndim - 1) + (2 * radius + 1,),
        window_strides=(1,) * x.ndim,
        padding=[*ends, (radius, radius)],
    )
    return (x32 * (bias + alpha * energy) ** -beta).astype(x.dtype)
