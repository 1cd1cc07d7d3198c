"""Pictures that say how they were made: a text in the file, written with it and read back with suspicion.

PNG files hold it in a ``tEXt`` chunk called ``diffsynth``, JPEG and WebP files in the EXIF ``UserComment``. The other
formats hold none.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from .data.image_file import read_size
from .errors import UserError
from .loader.writer import replace_file

KEYWORD = "diffsynth"
MAX_TEXT = 1 << 20
"""Characters; longer texts are refused unread."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EXIF_FOLDER, _USER_COMMENT = 0x8769, 0x9286
_ASCII = b"ASCII\0\0\0"
_MAX_EXIF_TEXT = 60_000
"""A JPEG segment ends at 64 KiB."""
_MAX_EXIF_FILE = 1 << 28
_EXIF_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, struct.error)


def picture_format(path: Path) -> str:
    """Pillow's name of the format that the ending means.

    Raises:
        UserError: the ending names no picture format that can be written.
    """
    Image.init()
    name = Image.registered_extensions().get(path.suffix.lower())
    if name is None or name not in Image.SAVE:
        raise UserError(f"{path}: {path.suffix or 'a name without ending'} is no picture format; use for example "
                        f"{path.with_suffix('.png').name}.")
    return name


def save_picture(image: Image.Image, path: Path, text: str = "") -> bool:
    """Write a picture with a text; a reader sees the old file or the complete new one.

    Equal pictures and texts give equal bytes.

    Args:
        image: RGB.
        path: Its ending decides the format.
        text: ASCII.
    Returns:
        Whether the file holds the text; a format without a place for it holds none.
    Raises:
        UserError: the ending names no picture format, or the file cannot be written.
    """
    kind = picture_format(path)
    options: dict = {}
    if text and kind == "PNG" and len(text) <= MAX_TEXT:
        from PIL.PngImagePlugin import PngInfo

        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text(KEYWORD, text)
    elif text and kind in ("JPEG", "WEBP") and len(text) <= _MAX_EXIF_TEXT:
        exif = Image.Exif()
        exif.get_ifd(_EXIF_FOLDER)[_USER_COMMENT] = _ASCII + text.encode("ascii")
        options["exif"] = exif
    with replace_file(path) as file:
        image.save(file, kind, **options)
    return bool(options)


def read_picture_text(path: Path) -> str | None:
    """The text that ``save_picture`` put into a file, or None; no pixel is decoded.

    Raises:
        UserError: the file is missing, damaged or no picture, or the text is longer than ``MAX_TEXT``.
    """
    read_size(path)  # refuses what is missing, damaged or no picture
    with path.open("rb") as file:
        if file.read(len(_PNG_SIGNATURE)) == _PNG_SIGNATURE:
            return _read_png_text(file, path)
    return _read_exif_text(path)


def _read_png_text(file: BinaryIO, path: Path) -> str | None:
    prefix = KEYWORD.encode() + b"\0"
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind in (b"IDAT", b"IEND"):
            return None  # the text stands before the pixels
        start = file.read(min(length, len(prefix)))
        if kind != b"tEXt" or start != prefix:
            file.seek(length - len(start) + 4, 1)
            continue
        if length - len(prefix) > MAX_TEXT:
            raise UserError(f"{path}: its {KEYWORD} text has {length - len(prefix):,} bytes and was not read; such a "
                            "picture does not come from this program.")
        content, checksum = file.read(length - len(prefix)), file.read(4)
        if zlib.crc32(kind + prefix + content) != int.from_bytes(checksum, "big") or not content.isascii():
            raise UserError(f"{path}: its {KEYWORD} text is damaged.")
        return content.decode("ascii")
    return None


def _read_exif_text(path: Path) -> str | None:
    if path.stat().st_size > _MAX_EXIF_FILE:
        return None
    try:
        with Image.open(path, formats=("JPEG", "WEBP")) as image:
            comment = image.getexif().get_ifd(_EXIF_FOLDER).get(_USER_COMMENT)
    except Image.UnidentifiedImageError:
        return None  # a format that holds no text
    except _EXIF_ERRORS as error:
        raise UserError(f"{path}: its EXIF data is damaged ({error}).") from error
    if not isinstance(comment, bytes) or not comment.startswith(_ASCII) or not comment.isascii():
        return None
    return comment.removeprefix(_ASCII).decode("ascii")
