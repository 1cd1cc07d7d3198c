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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from .files import require_file

MAX_PIXELS = 178_956_970
"""Pictures above this are refused from their header, before decoding: 512 MiB at three bytes a pixel, and the size at
which Pillow, too, calls a picture a decompression bomb."""

_DENSE_PIXELS = 2**26
_PIXELS_PER_BYTE = 64
"""Above the first number, a file with more pixels than this for each of its bytes was made to fill the memory: a
photograph has one or two."""

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


@dataclass(frozen=True)
class PictureHeader:
    """How a picture is stored; ``read_image`` makes the same of all of them."""

    format: str
    mode: str
    """As Pillow calls it: RGB, RGBA, CMYK, L, P, ..."""
    orientation: int
    """EXIF, 1 to 8; 1 is upright."""
    is_animated: bool
    """Whether it holds several frames or pages, of which only the first is used."""
    is_transparent: bool
    """Whether any pixel is."""


def read_header(path: Path) -> PictureHeader:
    """How a picture is stored, decoded only as far as that needs."""
    with _open(path) as image:
        transparent = image.has_transparency_data
        if transparent:
            low, _ = image.convert("RGBA").getchannel("A").getextrema()
            transparent = isinstance(low, int) and low < 255
        header = str(image.format), image.mode, _orientation(image, path)
        return PictureHeader(*header, _is_animated(image), transparent)


def _is_animated(image: Image.Image) -> bool:
    if image.format == "MPO":  # a stereo picture, or one with a preview
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except _DECODE_ERRORS as error:
        _logger.warning("%s: what follows its first frame is damaged (%s).", getattr(image, "filename", ""), error)
        return True


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
        is_header_alone = image.format == "PNG" and not _has_late_text(path)
        # Pillow's own method for PNG decodes the picture first, for what may come after the pixels
        exif = Image.Image.getexif(image) if is_header_alone else image.getexif()
        value = exif.get(_ORIENTATION_TAG, 1)
    except _DECODE_ERRORS as error:
        # every viewer shows such a picture as it is stored
        _logger.warning("%s: its EXIF data is damaged (%s) and not used.", path, error)
        return 1
    return value if isinstance(value, int) else 1


def _has_late_text(path: Path) -> bool:
    """Whether a PNG file has anything but pixels after the first of them; its chunks are counted off, not read."""
    seen_pixels = False
    with path.open("rb") as file:
        file.seek(8)
        for _ in range(_MAX_CHUNKS):
            start = file.read(8)
            if len(start) < 8 or start[4:] == b"IEND":
                return False
            seen_pixels = seen_pixels or start[4:] == b"IDAT"
            if seen_pixels and start[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(int.from_bytes(start[:4], "big") + 4, 1)
    return True


_MAX_CHUNKS = 100_000


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    num_bytes = require_file(path).st_size
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        with Image.open(path, formats=formats) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if width * height > max(_DENSE_PIXELS, _PIXELS_PER_BYTE * num_bytes):
                raise UserError(f"{path} unpacks {num_bytes:,} bytes to {width * height:,} pixels and was not decoded; "
                                "scale the picture down.")
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
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise UserError(f"{path} has 32-bit pixels, whose range is unknown; save it with 8 or 16 bits.")
    levels = np.empty(values.shape, np.uint8)
    for row in range(len(values)):  # one at a time: a large picture in wide integers would be eight times its size
        levels[row] = (values[row].astype(np.int32) + 128) // 257
    return Image.fromarray(levels)


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
