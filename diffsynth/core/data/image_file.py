"""Reading a picture safely and always the same way: upright, sRGB, eight bits, three channels.

Orientation tags are applied, an embedded colour profile is converted to sRGB, transparency is composited on white,
palette, grey, 16-bit and CMYK pictures become RGB, and an animation gives its first frame.
"""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from .files import require_file

MAX_PIXELS = 178_956_970
"""Pictures above this are refused from their header, before decoding: 512 MiB at three bytes a pixel, and the size at
which Pillow, too, calls a picture a decompression bomb."""

# No EPS or other format whose reader starts a program.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "TGA")
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = frozenset({5, 6, 7, 8})
# What Pillow's readers raise on damaged files.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AttributeError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_logger = logging.getLogger(__name__)


def read_image(path: Path) -> Image.Image:
    """Decode a picture to RGB.

    Raises:
        UserError: the file is missing, empty, damaged, not a picture, or larger than ``MAX_PIXELS``.
    """
    with _open(path) as image:
        image.load()
        turn = _UPRIGHT.get(_orientation(image, path))
    return _to_srgb(image if turn is None else image.transpose(turn), path)


def read_size(path: Path) -> tuple[int, int]:
    """(height, width) of the upright picture, from the file's header alone."""
    with _open(path) as image:
        width, height = image.size
        # Pillow itself turns TIFF files, and has their upright size already
        sideways = image.format != "TIFF" and _orientation(image, path) in _SIDEWAYS
        return (width, height) if sideways else (height, width)


def _orientation(image: Image.Image, path: Path) -> int:
    """The EXIF orientation, 1 to 8."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODE_ERRORS as error:
        # every viewer shows such a picture as it is stored
        _logger.warning("%s: its EXIF data is damaged (%s) and not used.", path, error)
        return 1
    return value if isinstance(value, int) else 1


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    require_file(path)
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        with Image.open(path, formats=formats) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path} has more than {MAX_PIXELS:,} pixels and was not decoded; scale the picture down."
        ) from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{path} is not a picture that can be read; replace or remove it.") from error
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except _DECODE_ERRORS as error:
        raise UserError(f"{path} is damaged ({error}); replace or remove it.") from error


def _to_srgb(image: Image.Image, path: Path) -> Image.Image:
    profile = image.info.get("icc_profile")
    image = _to_eight_bits(image, path)
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    elif image.mode in ("P", "1"):
        image = image.convert("RGB" if image.mode == "P" else "L")
    if profile:
        image = _apply_profile(image, profile, path)
    image = image.convert("RGB")
    if alpha is not None:
        white = Image.new("RGB", image.size, (255, 255, 255))
        image = Image.composite(image, white, alpha)
    clean = image.copy() if image.info else image
    clean.info = {}
    return clean


def _to_eight_bits(image: Image.Image, path: Path) -> Image.Image:
    if image.mode == "F":
        raise UserError(f"{path} has floating-point pixels, whose range is unknown; save it with 8 or 16 bits.")
    if image.mode == "LAB":
        raise UserError(f"{path} has Lab colours, which are not read; save it as RGB.")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise UserError(f"{path} has 32-bit pixels, whose range is unknown; save it with 8 or 16 bits.")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _apply_profile(image: Image.Image, profile: bytes, path: Path) -> Image.Image:
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        if source.profile.xcolor_space.strip() == "GRAY" and image.mode != "L":
            image = image.convert("L")
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        converted = ImageCms.profileToProfile(
            image, source, target, renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC, outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        # every viewer shows such a picture as if it had no profile, so that is what its author saw
        _logger.warning("%s: its colour profile cannot be applied (%s); its colours are taken as sRGB.", path, error)
        return image
    assert converted is not None, "profileToProfile returns a picture unless it is told to work in place"
    return converted
