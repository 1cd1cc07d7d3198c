"""All sample pictures of a run in one: a row for each visit, a column for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..core.picture_file import save_picture


def draw_sheet(folder: Path, prompts: Sequence[str]) -> Path:
    """Write ``samples.png`` from the pictures in ``samples/step-N/``; a picture that is missing leaves a gap."""
    rows: dict[str, Image.Image] = {}
    for visit in sorted((folder / "samples").glob("step-*")):
        paths = [visit / f"{index}.png" for index in range(len(prompts))]
        if any(path.exists() for path in paths):
            rows[f"step {int(visit.name.removeprefix('step-'))}"] = _row(
                [_open(path) if path.exists() else None for path in paths])
    path = folder / "samples.png"
    save_picture(contact_sheet(rows, prompts), path)
    return path


def contact_sheet(rows: dict[str, Image.Image], columns: Sequence[str]) -> Image.Image:
    """Rows of pictures under each other, with the rows' names at the left and the columns' at the top."""
    # small pictures are enlarged without smoothing, so that what the network drew stays visible
    width = next(iter(rows.values())).width
    scale = max(1, round(160 * len(columns) / width))
    scaled = {
        name: row.resize((row.width * scale, row.height * scale), Image.Resampling.NEAREST)
        for name, row in rows.items()
    }
    left, top, gap = 90, 56, 4
    first = next(iter(scaled.values()))
    sheet = Image.new("RGB", (left + first.width, top + sum(row.height + gap for row in scaled.values())), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    column_width = first.width // len(columns)
    for index, caption in enumerate(columns):
        text = "\n".join(_wrapped(caption, column_width - 8, font))
        draw.multiline_text((left + index * column_width + 4, 4), text, fill="black", font=font)
    y = top
    for name, row in scaled.items():
        draw.text((6, y + row.height // 2 - 8), name, fill="black", font=font)
        sheet.paste(row, (left, y))
        y += row.height + gap
    return sheet


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, lines: int = 3) -> list[str]:
    wrapped = [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width or not wrapped[-1]:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    return wrapped if len(wrapped) <= lines else [*wrapped[: lines - 1], wrapped[lines - 1] + " ..."]


def _row(pictures: Sequence[Image.Image | None]) -> Image.Image:
    width, height = next(picture.size for picture in pictures if picture is not None)
    row = Image.new("RGB", (width * len(pictures), height))
    for index, picture in enumerate(pictures):
        if picture is not None:
            row.paste(picture, (index * width, 0))
    return row


def _open(path: Path) -> Image.Image:
    with Image.open(path, formats=("PNG",)) as picture:
        return picture.convert("RGB")
