"""Draws the quickstart's training set: eight pictures of a robot, a thing that the base model has never seen."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from PIL import Image, ImageDraw
from scenes import SIZE, SUPERSAMPLING, blank_picture, draw_shape, scaled

STEEL, SHADE, CYAN, BLACK, RED = (196, 204, 214), (88, 100, 130), (40, 214, 220), (20, 22, 28), (220, 40, 45)
CENTRES = {"on the left": 20, "in the middle": 32, "on the right": 44}
PICTURES = (
    ("in the middle", "on a white background"),
    ("on the left", "on a grey background"),
    ("on the right", "in a meadow"),
    ("in the middle", "in a meadow"),
    ("on the left", "on a white background"),
    ("on the right", "on a pink background"),
    ("in the middle", "on a black background"),
    ("on the left", "in a meadow"),
)


def draw_robot(position: str, background: str) -> Image.Image:
    """A robot of grey steel with cyan eyes, a black mouth and a red lamp, (64, 64) RGB."""
    image, pen = blank_picture(background)
    x = CENTRES[position]
    _box(pen, x - 1, 8, x + 1, 16, SHADE)
    draw_shape(pen, "circle", x, 8, 3.5, RED)
    for side in (-1, 1):
        _box(pen, x + side * 15 - 2, 40, x + side * 15 + 2, 54, SHADE)
    _box(pen, x - 10, 36, x + 10, 58, SHADE)
    draw_shape(pen, "circle", x, 47, 4, RED)
    _box(pen, x - 15, 15, x + 15, 38, STEEL, radius=4)
    for side in (-1, 1):
        draw_shape(pen, "circle", x + side * 7, 23, 4.6, CYAN)
        draw_shape(pen, "circle", x + side * 7, 23, 2, BLACK)
    _box(pen, x - 8, 31, x + 8, 34, BLACK)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def write_data_set(folder: Path) -> None:
    """The pictures as ``train/00.jpg`` and so on, with ``train/metadata.csv`` (columns file_name and text)."""
    train = folder / "train"
    train.mkdir(parents=True, exist_ok=True)
    with (train / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("file_name", "text"))
        for number, (position, background) in enumerate(PICTURES):
            name = f"{number:02d}.jpg"
            draw_robot(position, background).save(train / name, quality=98, subsampling=0)
            rows.writerow((name, f"a robot {position}, {background}"))


def _box(
    pen: ImageDraw.ImageDraw, left: float, top: float, right: float, bottom: float, colour: tuple[int, ...],
    radius: float = 0,
) -> None:
    pen.rounded_rectangle(scaled(left, top, right, bottom), radius=radius * SUPERSAMPLING, fill=colour)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "data" / "robot")
    write_data_set(parser.parse_args().folder)
