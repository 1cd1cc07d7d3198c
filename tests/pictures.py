"""Small data sets drawn on the spot."""

from __future__ import annotations

import csv
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = ["red", "green", "blue", "orange", "purple", "teal", "black", "gold"]


def draw_picture(index: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    picture = Image.new("RGB", size, COLOURS[index % len(COLOURS)])
    width, height = size
    box = (width // 8 + index % 5, height // 8, width // 2 + index % 7, height // 2)
    ImageDraw.Draw(picture).ellipse(box, fill=COLOURS[(index + 3) % len(COLOURS)])
    return picture


def make_dataset(folder: Path, count: int = 5, sizes: list[tuple[int, int]] | None = None) -> Path:
    """The newer layout: pictures beside ``metadata.csv`` with the columns image and prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = sizes or [(64, 64)]
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "prompt"])
        for index in range(count):
            draw_picture(index, sizes[index % len(sizes)]).save(folder / f"image_{index}.png")
            writer.writerow([f"image_{index}.png", f"a {COLOURS[index % len(COLOURS)]} picture, number {index}"])
    return folder


def make_older_dataset(folder: Path, count: int = 5) -> Path:
    """The older layout: ``train/00.jpg`` and ``train/metadata.csv`` with the columns file_name and text."""
    train = folder / "train"
    train.mkdir(parents=True, exist_ok=True)
    rows = ["file_name,text"]
    for index in range(count):
        draw_picture(index).save(train / f"{index:02d}.jpg", quality=95)
        rows.append(f"{index:02d}.jpg,a dog")
    (train / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder
