"""What can be seen of one picture: how it is stored, bars at its edges, and a fingerprint that survives re-encoding."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..errors import UserError
from .image_file import PictureHeader, read_header, read_image
from .operators import PlannedFile

THUMBNAIL_SIDE = 160
_SMALL_SIDE = 256  # bars are looked for in a picture scaled down to this
_SAME = 10  # of 255: how far pixels of a bar lie apart, compression included
_OTHER = 24  # of 255: how far from the bar a pixel lies that belongs to the picture
_EDGE = 0.6  # share of the line next to a bar that must differ, or it is a subject on a plain background
_THINNEST_BAR = 0.02  # of the side


@dataclass(frozen=True)
class PictureFacts:
    """One file as the linter sees it."""

    problem: str | None = None
    """Why training would refuse it; the rest is unknown then."""
    header: PictureHeader | None = None
    size: tuple[int, int] = (0, 0)
    """(height, width), upright."""
    trained_size: tuple[int, int] | None = None
    """(height, width) after the operators."""
    bars: tuple[float, float, float, float] = (0, 0, 0, 0)
    """Share of the side that is a bar: top, bottom, left, right."""
    is_colourless: bool = False
    shape: int = 0
    """``dhash``."""
    colours: bytes = b""
    """8 x 8 pixels, RGB."""
    thumbnail: bytes = b""
    """JPEG, where asked for."""


def examine_picture(file: PlannedFile, with_thumbnail: bool = False) -> PictureFacts:
    """Decode a picture once and say what there is to say."""
    try:
        path = file.path()
        header, image = read_header(path), read_image(path)
        height, width = image.height, image.width
        for resizer in file.resizers or ():
            height, width = resizer.output_size(height, width)
    except UserError as error:
        return PictureFacts(problem=str(error))
    small = image.copy()
    small.thumbnail((_SMALL_SIDE, _SMALL_SIDE), Image.Resampling.BOX)
    colours = np.asarray(small.resize((8, 8), Image.Resampling.BOX), np.int16)
    return PictureFacts(
        None, header, (image.height, image.width), (height, width), find_bars(np.asarray(small)),
        bool((colours.max(-1) - colours.min(-1)).max() <= 2), dhash(small), colours.astype(np.uint8).tobytes(),
        thumbnail(image) if with_thumbnail else b"",
    )


def thumbnail(image: Image.Image) -> bytes:
    """A small JPEG of a picture."""
    small = image.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=70)
    return buffer.getvalue()


def dhash(image: Image.Image) -> int:
    """64 bits: whether each of 8 x 8 places is brighter than its right neighbour.

    Source: N. Krawetz, "Kind of Like That", hackerfactor.com, 2013.
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return int.from_bytes(np.packbits(grey[:, :-1] > grey[:, 1:]).tobytes(), "big")


def find_bars(pixels: np.ndarray) -> tuple[float, float, float, float]:
    """Share of the side that is a bar of one colour with a sharp edge: top, bottom, left, right.

    Args:
        pixels: (H, W, 3), uint8.
    """
    rows, columns = pixels.astype(np.int16), pixels.astype(np.int16).swapaxes(0, 1)
    top, bottom, left, right = (_bar(lines) for lines in (rows, rows[::-1], columns, columns[::-1]))
    return top, bottom, left, right


def _bar(lines: np.ndarray) -> float:
    """Share of the lines, from the first on, that are of one colour; 0 unless the picture begins with a whole line."""
    count = len(lines)
    colour = np.median(lines[0], axis=0)
    away = np.abs(lines - colour).max(-1)  # (lines, pixels)
    plain = away.max(-1) <= _SAME
    thickness = count if plain.all() else int(np.argmin(plain))
    if thickness < max(1, _THINNEST_BAR * count) or thickness > 0.45 * count:
        return 0.0
    edge = lines[min(thickness + 1, count - 1)]  # the very next line may be half bar, half picture
    differs = np.abs(edge - colour).max(-1) > _OTHER
    return thickness / count if differs.mean() >= _EDGE else 0.0


def group_alike(shapes: list[int], colours: list[bytes]) -> list[list[int]]:
    """Groups of pictures that look alike, by position; those that look like no other are left out.

    Two are alike when at most ``_BITS`` bits of their ``dhash`` differ and so do their colours on the average.
    """
    by_shape: dict[int, list[int]] = {}
    for position, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(position)
    parents = list(range(len(shapes)))

    def root(position: int) -> int:
        while parents[position] != position:
            parents[position] = parents[parents[position]]
            position = parents[position]
        return position

    pixels = np.frombuffer(b"".join(colours), np.uint8).reshape(len(colours), -1).astype(np.int16)
    for first, second in _near_shapes(list(by_shape)):
        candidates = np.array(by_shape[second])
        for position in by_shape[first]:
            close = np.abs(pixels[candidates] - pixels[position]).mean(-1) <= _COLOUR_DISTANCE
            for other in candidates[close].tolist():
                parents[root(other)] = root(position)
    groups: dict[int, list[int]] = {}
    for position in range(len(shapes)):
        groups.setdefault(root(position), []).append(position)
    return [group for group in groups.values() if len(group) > 1]


_BITS = 5
_COLOUR_DISTANCE = 8  # of 255


def _near_shapes(shapes: list[int]) -> list[tuple[int, int]]:
    """Pairs of hashes at most ``_BITS`` apart, each hash with itself among them.

    Of ``_BITS + 1`` parts of two such hashes, one is equal, so that only hashes that share a part are compared.
    """
    pairs = {(shape, shape) for shape in shapes}
    width = -(-64 // (_BITS + 1))
    for start in range(0, 64, width):
        parts: dict[int, list[int]] = {}
        for shape in shapes:
            parts.setdefault(shape >> start & ((1 << width) - 1), []).append(shape)
        for members in parts.values():
            values = np.array(members, np.uint64)
            for index in range(len(members) - 1):
                differing = np.unpackbits((values[index] ^ values[index + 1 :]).view(np.uint8)).reshape(-1, 64)
                near = np.nonzero(differing.sum(-1) <= _BITS)[0] + index + 1
                pairs.update((members[index], members[other]) for other in near.tolist())
    return sorted(pairs)
