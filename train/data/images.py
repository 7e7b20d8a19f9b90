"""Encoded images to arrays of one shape."""

import dataclasses
import io
import logging
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

Fit = Literal["crop", "squash"]
"""How an image gets another shape: "crop" scales it until it covers the shape and keeps the centre,
"squash" scales both sides and keeps everything."""

Ranges = Mapping[str, tuple[float, float]]
"""The values that become black and white, by kind of image with more than 8 bits a value."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
"""Pillow's names of the formats that are read; what a file holds decides, not its suffix."""

logging.getLogger("PIL").addHandler(logging.NullHandler())  # the errors raised say it all

_GREY = {"1", "L", "LA", "La", "I", "F"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MODES = {"1": "1-bit", "P": "palette", "PA": "palette"}


@dataclasses.dataclass(frozen=True)
class Look:
    """What has to be known of every file before one is decoded.

    Attributes:
        height: Of the image as it is to be seen, turned upright.
        width: Likewise.
        grey: Whether it has no colours by its format; RGB values that are all equal are colours.
        kind: "16-bit grey", "16-bit colour", "32-bit grey" or "floating-point grey"; None for 8
            bits or fewer.
        low: Its least value, 0.0 where `kind` is None.
        high: Its greatest.
    """

    height: int
    width: int
    grey: bool
    kind: str | None = None
    low: float = 0.0
    high: float = 0.0


def decode(
    encoded: bytes | pathlib.Path,
    shape: tuple[int, int, int],
    fit: Fit = "crop",
    ranges: Ranges | None = None,
) -> np.ndarray:
    """Decodes an image with Pillow, as `convert` does.

    Returns:
        ``uint8 [h, w, c]``, `shape`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be decoded; names the file.
    """
    try:
        return convert(encoded, shape, fit, ranges)[0]
    except FileNotFoundError:
        raise
    except Exception as error:
        what = encoded if isinstance(encoded, pathlib.Path) else f"{len(encoded)} bytes"
        raise ValueError(f"{what} cannot be decoded as an image: {reason(error)}") from error


def look(encoded: bytes | pathlib.Path) -> Look:
    """Looks at a file: of a JPEG, the slow one to decode, at its head alone.

    Raises:
        Exception: whatever Pillow raises; `reason` says it in words.
    """
    with _open(encoded) as image:
        kind, turn = _kind(image), _turn(image)
        low = high = 0.0
        if image.format not in ("JPEG", "MPO"):
            image.load()
        width, height = image.size
        if turn > 4 and image.format != "TIFF":  # Pillow turns TIFFs itself
            width, height = height, width
        if kind:
            values, _ = _values(encoded, image, kind)
            low, high = float(values.min()), float(values.max())
        return Look(height, width, _is_grey(image, kind), kind, low, high)


def convert(
    encoded: bytes | pathlib.Path,
    shape: tuple[int, int, int],
    fit: Fit = "crop",
    ranges: Ranges | None = None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Decodes an image and says what that took.

    The image is turned upright as its EXIF data say. Transparent parts are laid on white. Of
    several frames or pages the first is taken. Values of more than 8 bits are scaled: black and
    white are those of `ranges`, or else the least and the greatest of the image itself.

    Args:
        encoded: The bytes of a PNG, JPEG, ... or the file that holds them.
        shape: ``(h, w, c)`` of the result, c 1 for grey values and 3 for RGB.
        fit: How to get to ``(h, w)``; both ways average over the pixels that are lost.
        ranges: As in `train.data.Dataset`.

    Returns:
        ``(image, how)``: ``uint8 [h, w, c]``, and what was changed, in words.

    Raises:
        Exception: whatever Pillow raises; `reason` says it in words.
    """
    height, width, channels = shape
    with _open(encoded) as image:
        kind, turn = _kind(image), _turn(image)
        full = image.size
        wanted = (height, width) if turn > 4 and image.format != "TIFF" else (width, height)
        image.draft(None, wanted)  # lets JPEG skip detail that scaling would discard
        image.load()
        how = []
        if kind:
            how.append(f"{kind} scaled to 8 bits")
        elif image.mode in _MODES or image.mode not in ("L", "LA", "RGB", "RGBA"):
            how.append(
                f"{_MODES.get(image.mode, image.mode)} to {'grey' if channels == 1 else 'RGB'}"
            )
        if channels == 3 and _is_grey(image, kind):
            how.append("grey to RGB")
        if _has_more_frames(image):
            how.append("first of several frames")
        flat, transparent = _on_white(_in_8_bits(encoded, image, kind, ranges) if kind else image)
        if transparent:
            how.append("transparent parts on white")
        if turn in _TURNS:
            how.append("turned upright")
            if image.format != "TIFF":
                flat = flat.transpose(_TURNS[turn])
        flat = flat.convert("L" if channels == 1 else "RGB")
        if full != wanted:
            how.append("scaled and cut to size" if fit == "crop" else "scaled")
        if flat.size != (width, height):
            method = Image.Resampling.BILINEAR
            if fit == "crop":
                flat = ImageOps.fit(flat, (width, height), method)
            else:
                flat = flat.resize((width, height), method)
    return np.asarray(flat).reshape(shape), tuple(how)


def reason(error: Exception) -> str:
    """Says in a few words why a file could not be read."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture of a known format, or a damaged one"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels (a decompression bomb, Pillow says)"
    if isinstance(error, MemoryError):
        return "too large for the memory"
    said = " ".join(str(error).split())
    return said or type(error).__name__


def _open(encoded: bytes | pathlib.Path) -> Image.Image:
    source = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
    return Image.open(source, formats=FORMATS)


def _turn(image: Image.Image) -> int:
    """The EXIF orientation, 1 for upright, also where the EXIF data are damaged."""
    if image.format == "PNG":
        image.load()  # its EXIF data may come after the pixels
    try:
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a picture all the same
        return 1
    return turn if turn in _TURNS else 1


def _is_grey(image: Image.Image, kind: str | None) -> bool:
    if kind:
        return kind.endswith("grey")
    if image.mode in ("P", "PA"):
        palette = np.array(image.getpalette("RGB") or []).reshape(-1, 3)
        return bool((palette == palette[:, :1]).all())
    return image.mode in _GREY


def _has_more_frames(image: Image.Image) -> bool:
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # what follows the first frame is damaged, which does not matter here
        return True


def _rawmodes(image: Image.Image) -> list[str]:
    """How the values lie in the file, by Pillow's names; gone once the image is loaded."""
    arguments = [tile[3] for tile in getattr(image, "tile", ())]
    return [str(a[0] if isinstance(a, tuple) and a else a) for a in arguments]


def _kind(image: Image.Image) -> str | None:
    if image.mode.startswith("I;16"):
        return "16-bit grey"
    if image.mode in ("I", "F"):
        return {"I": "32-bit grey", "F": "floating-point grey"}[image.mode]
    for rawmode in _rawmodes(image):
        if re.fullmatch(r"(RGB|RGBA|RGBX);16[BLN]", rawmode):
            return "16-bit colour"
        if rawmode == "LA;16B":
            return "16-bit grey"
    return None


def _values(
    encoded: bytes | pathlib.Path, image: Image.Image, kind: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """The values of an image of more than 8 bits, and its alpha channel if it has one.

    Of 16-bit colours Pillow keeps the high bytes. The low ones come from opening the file again
    as if its bytes lay in the other order.

    Returns:
        ``float32 [h, w]`` or ``[h, w, 3]``, and ``uint8 [h, w]`` or None.
    """
    alpha = None
    key = image.info.get("transparency")
    if image.mode in ("RGB", "RGBA"):
        with _open(encoded) as other:
            grey = "LA;16B" in _rawmodes(other)
            other.tile = [  # pyright: ignore[reportAttributeAccessIssue]
                tile._replace(args=_other_bytes(tile.args))
                for tile in other.tile  # pyright: ignore[reportAttributeAccessIssue]
            ]
            other = np.asarray(other).astype(np.float32)
        high = np.asarray(image)
        if grey:  # high and low byte of the value, high and low byte of alpha
            values, alpha = other[..., 0] * 256 + other[..., 1], high[..., 3]
        else:
            values = high[..., :3] * np.float32(256) + other[..., :3]
            alpha = high[..., 3] if image.mode == "RGBA" else None
        if alpha is None and isinstance(key, tuple):
            alpha = np.where((values == key).all(-1), 0, 255).astype(np.uint8)
    else:
        values = np.asarray(image).astype(np.float32)
        if isinstance(key, int):
            alpha = np.where(values == key, 0, 255).astype(np.uint8)
    if not np.isfinite(values).all():
        raise ValueError("holds values that are not finite")
    return values, alpha


def _other_bytes(args: str | tuple) -> str | tuple:
    rawmode = args if isinstance(args, str) else args[0]
    if rawmode == "LA;16B":
        changed = "RGBA"
    else:
        order = rawmode[-1]
        native = {"little": "L", "big": "B"}[sys.byteorder]
        changed = rawmode[:-1] + {"L": "B", "B": "L"}[native if order == "N" else order]
    return changed if isinstance(args, str) else (changed, *args[1:])


def _in_8_bits(
    encoded: bytes | pathlib.Path, image: Image.Image, kind: str, ranges: Ranges | None
) -> Image.Image:
    values, alpha = _values(encoded, image, kind)
    low, high = (ranges or {}).get(kind, (min(0.0, float(values.min())), float(values.max())))
    scaled = np.clip((values - low) * (255 / max(high - low, 1e-30)), 0, 255)
    tags = getattr(image, "tag_v2", {})
    if values.ndim == 2 and tags.get(262) == 0:  # photometric interpretation: white is zero
        scaled = 255 - scaled
    flat = Image.fromarray(np.rint(scaled).astype(np.uint8))
    if alpha is not None:
        flat.putalpha(Image.fromarray(alpha))
    return flat


def _on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image without its alpha channel, and whether anything shone through."""
    if not image.has_transparency_data:
        return image, False
    image = image.convert("RGBA")
    if image.getextrema()[3][0] == 255:  # pyright: ignore[reportIndexIssue, reportGeneralTypeIssues, reportOptionalSubscript]
        return image, False
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image), True
