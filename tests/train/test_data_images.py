"""Odd encoded images: what comes out, and what is said of it."""

import io
import itertools
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageSequence

from train.data import images

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (5, 7, 3), np.uint8)
GREYS = COLOURS[..., 0]


def encoded(image, fmt, **options):
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def png(values, chunks=b""):
    """A 16-bit PNG of ``uint16 [h, w, c]``, with c 1 to 4; Pillow writes grey ones only."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    data = zlib.compress(rows)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunks + chunk(b"IDAT", data) + chunk(b"IEND")
    )


def chunk(name, content=b""):
    crc = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + crc


def tiff(values, *, order="<", compressed=False, photometric=None, signed=False):
    """A TIFF of integers or floats ``[h, w, c]``."""
    height, width, channels = values.shape
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    data = zlib.compress(data) if compressed else data
    bits = values.dtype.itemsize * 8
    if photometric is None:
        photometric = 2 if channels >= 3 else 1
    sample_format = 3 if values.dtype.kind == "f" else 2 if signed else 1
    tags = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, [bits] * channels),
        (259, 3, [8 if compressed else 1]),
        (262, 3, [photometric]),
        (273, 4, [8]),
        (277, 3, [channels]),
        (278, 4, [height]),
        (279, 4, [len(data)]),
        *([(338, 3, [2])] if channels == 4 else []),
        (339, 3, [sample_format] * channels),
    ]
    data += b"\0" * (len(data) % 2)
    extra, directory = b"", b""
    after = 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, kind, numbers in tags:
        packed = struct.pack(order + {3: "H", 4: "I"}[kind] * len(numbers), *numbers)
        if len(packed) > 4:
            packed, extra = struct.pack(order + "I", after + len(extra)), extra + packed
        directory += struct.pack(order + "HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8 + len(data))
    count = struct.pack(order + "H", len(tags))
    return head + data + count + directory + struct.pack(order + "I", 0) + extra


def convert(content, channels=3, ranges=None, shape=(5, 7)):
    return images.convert(content, (*shape, channels), ranges=ranges)


SIXTEEN = RNG.integers(0, 4096, (5, 7, 4), np.uint16)
CODERS = {
    "png": png,
    "tiff little": tiff,
    "tiff big": lambda v: tiff(v, order=">"),
    "tiff little deflate": lambda v: tiff(v, compressed=True),
    "tiff big deflate": lambda v: tiff(v, order=">", compressed=True),
}


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled_by_the_given_range_and_else_by_their_own(coder, channels):
    values = SIXTEEN[..., :channels]
    content = CODERS[coder](values)
    kind = {1: "16-bit grey", 3: "16-bit colour"}[channels]
    look = images.look(content)
    assert look == images.Look(5, 7, channels == 1, kind, values.min(), values.max())
    image, how = convert(content, channels, {kind: (0.0, 4095.0)})
    np.testing.assert_array_equal(image, np.rint(values * (255 / 4095)))
    assert how == (f"{kind} scaled to 8 bits",)
    own, _ = convert(content, channels)
    np.testing.assert_array_equal(own, np.rint(values * (255 / values.max())))
    # Outside the range: white, not wrapped around.
    assert convert(content, channels, {kind: (0.0, 100.0)})[0].max() == 255


@pytest.mark.parametrize(("coder", "channels"), [("png", 2), ("png", 4), ("tiff little", 4)])
def test_16_bits_with_transparency(coder, channels):
    values = SIXTEEN[..., :channels].copy()
    values[..., -1] = 65535
    values[0, 0, -1] = 0
    grey = channels == 2
    kind = "16-bit grey" if grey else "16-bit colour"
    content = CODERS[coder](values)
    assert images.look(content).kind == kind
    assert images.look(content).grey == grey
    image, how = convert(content, 1 if grey else 3, {kind: (0.0, 4095.0)})
    expected = np.rint(values[..., : channels - 1] * (255 / 4095))
    expected[0, 0] = 255
    np.testing.assert_array_equal(image, expected)
    assert how == (f"{kind} scaled to 8 bits", "transparent parts on white")


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_png_with_a_transparent_colour(channels):
    values = SIXTEEN[..., :channels]
    key = b"".join(struct.pack(">H", v) for v in values[2, 3])
    kind = {1: "16-bit grey", 3: "16-bit colour"}[channels]
    content = png(values, chunk(b"tRNS", key))
    image, how = convert(content, channels, {kind: (0.0, 4095.0)})
    assert (image[2, 3] == 255).all()
    assert how[-1] == "transparent parts on white"
    others = np.ones((5, 7), bool) & (values != values[2, 3]).any(-1)
    np.testing.assert_array_equal(image[others], np.rint(values * (255 / 4095))[others])


def test_white_is_zero():
    content = tiff(SIXTEEN[..., :1], photometric=0)
    image, _ = convert(content, 1, {"16-bit grey": (0.0, 4095.0)})
    np.testing.assert_array_equal(image, 255 - np.rint(SIXTEEN[..., :1] * (255 / 4095)))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (RNG.integers(-1000, 3000, (5, 7, 1)).astype(np.int16), "32-bit grey"),
        (RNG.integers(-(10**6), 10**6, (5, 7, 1)).astype(np.int32), "32-bit grey"),
        (RNG.normal(size=(5, 7, 1)).astype(np.float32), "floating-point grey"),
    ],
)
def test_signed_and_floating_point_values(values, kind):
    content = tiff(values, signed=values.dtype.kind == "i")
    low, high = float(values.min()), float(values.max())
    assert low < 0
    assert images.look(content) == images.Look(5, 7, True, kind, low, high)
    image, _ = convert(content, 1)
    np.testing.assert_allclose(image, (values - low) / (high - low) * 255, atol=0.51)


def test_values_that_are_not_finite():
    values = np.ones((5, 7, 1), np.float32)
    values[2, 2] = np.nan
    with pytest.raises(ValueError, match=r"98. bytes cannot be decoded .* that are not finite"):
        images.decode(tiff(values) + b"\0" * (980 - len(tiff(values))), (5, 7, 1))


def test_a_black_16_bit_image_stays_black():
    content = encoded(Image.fromarray(np.zeros((5, 7), np.uint16)), "PNG")
    assert not convert(content, 1)[0].any()


def as_mode(mode):
    return Image.fromarray(COLOURS).convert(mode)


@pytest.mark.parametrize(
    ("image", "fmt", "channels", "expected", "how"),
    [
        (Image.fromarray(GREYS), "PNG", 1, GREYS, ()),
        (Image.fromarray(GREYS), "PNG", 3, np.dstack([GREYS] * 3), ("grey to RGB",)),
        (Image.fromarray(COLOURS), "BMP", 3, COLOURS, ()),
        (Image.fromarray(COLOURS), "PPM", 3, COLOURS, ()),
        (Image.fromarray(COLOURS), "TIFF", 3, COLOURS, ()),
        (as_mode("1"), "PNG", 1, np.asarray(as_mode("1")) * 255, ("1-bit to grey",)),
        (as_mode("1"), "BMP", 1, np.asarray(as_mode("1")) * 255, ("1-bit to grey",)),
        (as_mode("P"), "PNG", 3, np.asarray(as_mode("P").convert("RGB")), ("palette to RGB",)),
        (as_mode("P"), "GIF", 3, np.asarray(as_mode("P").convert("RGB")), ("palette to RGB",)),
        (as_mode("CMYK"), "TIFF", 3, COLOURS, ("CMYK to RGB",)),
    ],
)
def test_modes(image, fmt, channels, expected, how):
    found, said = convert(encoded(image, fmt), channels)
    np.testing.assert_array_equal(found.squeeze(), expected)
    assert said == how


def test_cmyk_jpeg_is_not_a_negative():
    red = Image.new("RGB", (7, 5), (250, 10, 10)).convert("CMYK")
    image, how = convert(encoded(red, "JPEG", quality=95))
    np.testing.assert_allclose(image, np.full((5, 7, 3), [250, 10, 10]), atol=4)
    assert how == ("CMYK to RGB",)


def with_alpha(mode):
    image = Image.fromarray(COLOURS).convert(mode)
    alpha = np.full((5, 7), 255, np.uint8)
    alpha[0], alpha[1] = 0, 128
    image.putalpha(Image.fromarray(alpha))
    return image, alpha[..., None] / 255


@pytest.mark.parametrize(
    ("fmt", "mode"),
    [*itertools.product(["PNG", "WEBP", "TIFF"], ["RGB", "L"]), ("GIF", "RGB")],
)
def test_transparent_parts_are_white(fmt, mode):
    image, alpha = with_alpha(mode)
    channels = len(mode)
    content = encoded(image, fmt, **({"lossless": True, "exact": True} if fmt == "WEBP" else {}))
    if (fmt, mode) == ("WEBP", "L"):
        channels = 3  # which knows no grey
    found, how = convert(content, channels)
    assert how[-1] == "transparent parts on white"
    assert (found[0] == 255).all()
    if fmt != "GIF":  # where a colour is there or not
        colours = np.asarray(image.convert("RGB")).astype(float)[..., :channels]
        np.testing.assert_allclose(found, alpha * colours + (1 - alpha) * 255, atol=1)


@pytest.mark.parametrize(
    ("mode", "fill", "key"),
    [("L", 7, 7), ("RGB", (1, 2, 3), (1, 2, 3)), ("P", 5, 5), ("P", 1, b"\x80\0"), ("1", 0, 0)],
)
def test_a_transparent_colour_is_white(mode, fill, key):
    image = Image.new(mode, (7, 5), fill)
    if mode == "P":
        image.putpalette(range(30))
    found, how = convert(encoded(image, "PNG", transparency=key))
    assert (found == 255).all()
    assert how[-1] == "transparent parts on white"


def test_an_opaque_alpha_channel_is_nothing_to_say():
    image = Image.fromarray(COLOURS).convert("RGBA")
    found, how = convert(encoded(image, "PNG"))
    np.testing.assert_array_equal(found, COLOURS)
    assert how == ()


BACK = {  # from upright to how the camera stored it
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[:, ::-1],
}


def turned(upright, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    return {"image": Image.fromarray(np.ascontiguousarray(BACK[turn](upright))), "exif": exif}


@pytest.mark.parametrize("turn", BACK)
@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_photographs_are_upright(fmt, turn):
    # Blocks of 8, so that JPEG changes little.
    upright = np.kron(RNG.integers(0, 256, (3, 5), np.uint8), np.ones((16, 16), np.uint8))
    upright = np.dstack([upright] * 3)
    options = {"lossless": True} if fmt == "WEBP" else {"quality": 95} if fmt == "JPEG" else {}
    content = encoded(fmt=fmt, **turned(upright, turn), **options)
    look = images.look(content)
    assert (look.height, look.width, look.grey) == (48, 80, False)
    found, how = convert(content, shape=(48, 80))
    np.testing.assert_allclose(found, upright, atol=12 if fmt == "JPEG" else 0)
    assert how == (() if turn == 1 else ("turned upright",))
    # Scaled while a JPEG is decoded, too.
    large = np.kron(upright, np.ones((8, 8, 1), np.uint8))
    content = encoded(fmt=fmt, **turned(large, turn), **options)
    found, how = convert(content, shape=(48, 80))
    middle = np.s_[8::16, 8::16]  # edges are smoothed
    np.testing.assert_allclose(found[middle], upright[middle], atol=12 if fmt == "JPEG" else 0)
    assert how[-1] == "scaled and cut to size"


@pytest.mark.parametrize("kind", ["16-bit", "transparent"])
def test_upright_with_other_oddities(kind):
    values = SIXTEEN[..., 0] if kind == "16-bit" else np.asarray(with_alpha("RGB")[0])
    content = encoded(fmt="PNG", **turned(values, 6))
    plain = encoded(fmt="PNG", **turned(values, 1))
    found, how = convert(content)
    np.testing.assert_array_equal(found, convert(plain)[0])
    assert how[-1] == "turned upright"


def test_damaged_exif_is_left_alone():
    content = encoded(Image.fromarray(COLOURS), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(convert(content)[0], COLOURS)


@pytest.mark.parametrize("fmt", ["GIF", "PNG", "TIFF", "WEBP"])
def test_the_first_frame_counts(fmt):
    frames = [Image.fromarray(np.full((5, 7, 3), v, np.uint8)) for v in (40, 200)]
    options = {"lossless": True} if fmt == "WEBP" else {}
    content = encoded(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(content))))) == 2
    found, how = convert(content)
    assert (found == 40).all()
    assert "first of several frames" in how
    # What is damaged behind the first frame does no harm; if Pillow finds it, then by its name.
    try:
        assert (images.decode(content[:-12], (5, 7, 3)) == 40).all()
    except ValueError as error:
        assert "cannot be decoded" in str(error)  # noqa: PT017


def test_grey_by_format_not_by_values():
    def is_grey(mode, fmt):
        image = Image.fromarray(GREYS).convert(mode)
        return images.look(encoded(image, fmt)).grey

    grey = [
        ("L", "PNG"),
        ("L", "JPEG"),
        ("1", "BMP"),
        ("LA", "PNG"),
        ("L", "GIF"),
        ("I;16", "TIFF"),
    ]
    assert all(is_grey(*pair) for pair in grey)
    assert not any(is_grey("RGB", fmt) for fmt in ("PNG", "JPEG", "BMP", "TIFF"))
    # A palette is grey if its colours are.
    image = Image.fromarray(GREYS // 64).convert("P")
    image.putpalette([v for step in range(4) for v in [step * 60] * 3])
    assert images.look(encoded(image, "PNG")).grey
    image.putpalette([0, 0, 0, 0, 0, 1])
    assert not images.look(encoded(image, "PNG")).grey


def test_squash_and_crop():
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 4:] = 255
    content = encoded(Image.fromarray(wide), "PNG")
    crop, squash = (images.decode(content, (4, 4, 3), fit) for fit in ("crop", "squash"))
    np.testing.assert_array_equal(crop[..., 0], [[0, 0, 255, 255]] * 4)
    assert (np.diff(squash[0, :, 0].astype(int)) >= 0).all()
    assert squash[0, 0, 0] < squash[0, 3, 0]
    np.testing.assert_array_equal(images.decode(content, (4, 8, 3)), wide)


FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def photograph():
    return Image.fromarray(RNG.integers(0, 256, (40, 40, 3), np.uint8))


@pytest.mark.parametrize("fmt", FORMATS)
def test_truncated_files(fmt):
    content = encoded(photograph(), fmt)
    assert images.decode(content, (40, 40, 3)).shape == (40, 40, 3)
    for share in (0.02, 0.3, 0.6):
        with pytest.raises(ValueError, match=r"bytes cannot be decoded as an image: \w"):
            images.decode(content[: int(share * len(content))], (40, 40, 3))


@pytest.mark.parametrize("fmt", FORMATS)
def test_whatever_is_wrong_the_error_is_one(fmt):
    """Bytes changed at random: an image, or a ValueError; Pillow raises half a dozen kinds."""
    content = encoded(photograph(), fmt)
    rng = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(content)
        for place in rng.integers(0, min(len(content), 400), 3):
            damaged[place] = rng.integers(256)
        try:
            with warnings.catch_warnings(action="ignore"):
                images.decode(bytes(damaged), (8, 8, 3))
        except ValueError as error:
            assert "cannot be decoded as an image: " in str(error)  # noqa: PT017


def bomb():
    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT") + chunk(b"IEND")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes cannot be decoded as an image: not a picture of a known format"),
        (b"<html>no picture</html>", "not a picture of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture of a known format"),
        (bomb(), "too many pixels"),
    ],
)
def test_no_pictures(content, message):
    with pytest.raises(ValueError, match=message):
        images.decode(content, (8, 8, 3))


def test_files_by_name(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(COLOURS), "JPEG"))  # the content decides
    assert images.decode(path, (5, 7, 3)).shape == (5, 7, 3)
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"/a\.png cannot be decoded as an image: not a picture"):
        images.decode(path, (5, 7, 3))
    with pytest.raises(FileNotFoundError):
        images.decode(tmp_path / "b.png", (5, 7, 3))
