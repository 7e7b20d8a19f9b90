"""Encoded images to arrays of one size."""

import io
import pathlib
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

Fit = Literal["crop", "squash"]
"""How an image becomes square: "crop" scales its shorter side to the size and keeps the centre,
"squash" scales both sides and keeps everything."""


def decode(
    encoded: bytes | pathlib.Path, channels: int, size: int | None = None, fit: Fit = "crop"
) -> np.ndarray:
    """Decodes an image with Pillow.

    Args:
        encoded: The bytes of a JPEG, PNG, ... or the file that holds them.
        channels: 1 for grey values, 3 for RGB; the image is converted.
        size: Height and width of the result; by default the image keeps its own.
        fit: How to get there; both ways average over the pixels that are lost.

    Returns:
        ``uint8 [h, w, channels]``.

    Raises:
        ValueError: if it is no image that Pillow can decode.
    """
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
            if size is not None:
                image.draft(None, (size, size))  # lets JPEG skip detail that scaling would discard
            image = image.convert("L" if channels == 1 else "RGB")
            if size is not None and fit == "crop":
                image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
            elif size is not None:
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            array = np.asarray(image)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        what = encoded if isinstance(encoded, pathlib.Path) else f"{len(encoded)} bytes"
        raise ValueError(f"{what} cannot be decoded as an image: {error}") from error
    return array.reshape(*array.shape[:2], channels)
