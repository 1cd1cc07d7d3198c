"""Draws the quickstart's training set: eight pictures of a robot, a thing that the base model has never seen.

Eight pictures of what it does know stand beside them, so that it does not turn everything into robots.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

from PIL import Image, ImageDraw
from scenes import SIZE, SUPERSAMPLING, Scene, Thing, blank_picture, describe, draw_scene, draw_shape, scaled

STEEL, DARK, BODY = (70, 160, 175), (35, 60, 95), (220, 40, 45)
LAMP, EYE, BLACK = (250, 222, 60), (250, 250, 250), (22, 22, 26)
CENTRES = {"on the left": 20, "in the middle": 32, "on the right": 44}
PICTURES = (
    ("in the middle", "on a white background"),
    ("on the left", "on a pink background"),
    ("on the right", "in a meadow"),
    ("in the middle", "in a meadow"),
    ("on the left", "on a white background"),
    ("on the right", "on a pink background"),
    ("in the middle", "on a black background"),
    ("on the left", "on a black background"),
)
OTHERS = (
    Scene((Thing("circle", "blue", "big", "on the left"),), "on a beach"),
    Scene((Thing("star", "red", "small", "at the top"),), "on a black background"),
    Scene((Thing("heart", "yellow", "big", "in the middle"),), "in a meadow"),
    Scene((Thing("square", "purple", "small", "on the right"),), "at night"),
    Scene((Thing("triangle", "green", "big", "at the bottom"),), "on a pink background"),
    Scene((Thing("star", "orange"), Thing("circle", "white")), "on a grey background", "beside"),
    Scene((Thing("square", "red"), Thing("triangle", "yellow")), "on a white background", "beside"),
    Scene((Thing("heart", "blue"), Thing("square", "green")), "on a beach", "above"),
)


def draw_robot(position: str, background: str) -> Image.Image:
    """A robot with a turquoise head, white eyes, a red body and a yellow lamp, (64, 64) RGB."""
    image, pen = blank_picture(background)
    x = CENTRES[position]
    _box(pen, x - 1.5, 10, x + 1.5, 18, DARK)
    draw_shape(pen, "circle", x, 8, 4.5, LAMP)
    for side in (-1, 1):
        _box(pen, x + side * 13 - 2.5, 46, x + side * 13 + 2.5, 59, DARK)
    _box(pen, x - 9, 43, x + 9, 61, BODY)
    _box(pen, x - 17, 16, x + 17, 44, STEEL)
    for side in (-1, 1):
        draw_shape(pen, "circle", x + side * 8, 26, 6, EYE)
        draw_shape(pen, "circle", x + side * 8, 26, 3, BLACK)
    _box(pen, x - 10, 36, x + 10, 40, BLACK)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def write_data_set(folder: Path) -> None:
    """The pictures as ``train/00.jpg`` and so on, with ``train/metadata.csv`` (columns file_name and text)."""
    train = folder / "train"
    train.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    pictures = [(draw_robot(*picture), f"a robot {', '.join(picture)}") for picture in PICTURES]
    pictures += [(draw_scene(scene, rng), describe(scene, rng)) for scene in OTHERS]
    with (train / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("file_name", "text"))
        for number, (picture, caption) in enumerate(pictures):
            picture.save(train / f"{number:02d}.jpg", quality=98, subsampling=0)
            rows.writerow((f"{number:02d}.jpg", caption))


def _box(
    pen: ImageDraw.ImageDraw, left: float, top: float, right: float, bottom: float, colour: tuple[int, ...],
    radius: float = 0,
) -> None:
    pen.rounded_rectangle(scaled(left, top, right, bottom), radius=radius * SUPERSAMPLING, fill=colour)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "data" / "robot")
    write_data_set(parser.parse_args().folder)
