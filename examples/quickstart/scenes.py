"""Draws the pictures on which the quickstart's base model is trained: coloured shapes before plain backgrounds.

Every picture follows from its index alone, so the data set need not be stored. ``draw_clutter`` serves the autoencoder:
random patches, discs and lines, so that it also renders what the scenes never show.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SIZE = 64
SUPERSAMPLING = 4
COLOURS = {
    "red": (220, 40, 45),
    "orange": (245, 140, 30),
    "yellow": (250, 222, 60),
    "green": (25, 130, 60),
    "blue": (45, 90, 220),
    "purple": (140, 60, 180),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "heart")
SIZES = {"small": 10.0, "big": 18.0}
POSITIONS = {
    "on the left": (20, 32),
    "on the right": (44, 32),
    "in the middle": (32, 32),
    "at the top": (32, 20),
    "at the bottom": (32, 44),
}
BACKGROUNDS = {
    "on a white background": ((238, 238, 240),),
    "on a black background": ((22, 22, 26),),
    "on a grey background": ((128, 130, 134),),
    "on a pink background": ((246, 176, 196),),
    "in a meadow": ((160, 212, 248), (124, 196, 92)),
    "on a beach": ((160, 212, 248), (70, 140, 205), (240, 216, 160)),
    "at night": ((26, 30, 78), (40, 62, 60)),
}
HORIZONS = {2: (38,), 3: (28, 40)}
PAIR_RADIUS = 12.5
PAIR_POSITIONS = {"beside": ((16, 32), (48, 32)), "above": ((32, 16), (32, 48))}


@dataclass(frozen=True)
class Thing:
    """One shape of a scene; ``position`` is empty in a pair."""

    shape: str
    colour: str
    size: str = "big"
    position: str = ""

    def words(self) -> str:
        return f"{'an' if self.colour == 'orange' else 'a'} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one thing, or two things ``beside`` or ``above`` each other."""

    things: tuple[Thing, ...]
    background: str
    relation: str = ""


def make_scene(index: int, seed: int = 0) -> Scene:
    """The scene number ``index``: a pair in half of the cases."""
    rng = random.Random(f"scene {seed} {index}")
    background = rng.choice(list(BACKGROUNDS))
    colours = [name for name in COLOURS if not (name == "white" and background == "on a white background")]
    if rng.random() < 0.5:
        position = rng.choice(list(POSITIONS))
        thing = Thing(rng.choice(SHAPES), rng.choice(colours), rng.choice(list(SIZES)), position)
        return Scene((thing,), background)
    pair = tuple(Thing(rng.choice(SHAPES), rng.choice(colours)) for _ in range(2))
    return Scene(pair, background, rng.choice(("beside", "beside", "above")))


def describe(scene: Scene, rng: random.Random) -> str:
    """A caption in one of a few phrasings; what is left out is a big thing in the middle."""
    return ("a picture of " if rng.random() < 0.15 else "") + _phrase(scene, rng)


def _phrase(scene: Scene, rng: random.Random) -> str:
    if not scene.relation:
        thing = scene.things[0]
        default = thing.size == "big" and thing.position == "in the middle"
        if default and rng.random() < 0.5:
            return f"{thing.words()} {scene.background}"
        words = f"a {thing.size} {thing.colour} {thing.shape}"
        return f"{words} {thing.position}, {scene.background}"
    first, second = (thing.words() for thing in scene.things)
    if scene.relation == "beside":
        phrases = (
            f"{first} on the left and {second} on the right",
            f"{first} left of {second}",
            f"{second} right of {first}",
        )
    else:
        phrases = (
            f"{first} above {second}",
            f"{second} below {first}",
            f"{first} at the top and {second} at the bottom",
        )
    return f"{rng.choice(phrases)}, {scene.background}"


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """The picture of a scene, (64, 64) RGB; places, sizes and colours vary by a little."""
    image, pen = blank_picture(scene.background)
    if scene.relation:
        places = [(*place, PAIR_RADIUS) for place in PAIR_POSITIONS[scene.relation]]
    else:
        thing = scene.things[0]
        places = [(*POSITIONS[thing.position], SIZES[thing.size])]
    for thing, (x, y, radius) in zip(scene.things, places, strict=True):
        x, y, radius = x + rng.uniform(-1.5, 1.5), y + rng.uniform(-1.5, 1.5), radius + rng.uniform(-1, 1)
        colour = tuple(min(255, max(0, value + rng.randint(-6, 6))) for value in COLOURS[thing.colour])
        draw_shape(pen, thing.shape, x, y, radius, colour)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def example(index: int, seed: int = 0) -> tuple[Image.Image, str]:
    """Picture and caption number ``index``."""
    rng = random.Random(f"picture {seed} {index}")
    scene = make_scene(index, seed)
    return draw_scene(scene, rng), describe(scene, rng)


def draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: tuple[int, ...]
) -> None:
    """One shape around (x, y), in pixels of the finished picture."""
    if shape == "circle":
        pen.ellipse(scaled(x - radius, y - radius, x + radius, y + radius), fill=colour)
        return
    points = [(x + radius * across, y + radius * down) for across, down in _outline(shape)]
    pen.polygon(scaled(*(value for point in points for value in point)), fill=colour)


def scaled(*values: float) -> list[float]:
    """Coordinates of the finished picture as coordinates of the supersampled canvas."""
    return [value * SUPERSAMPLING for value in values]


def draw_clutter(index: int, seed: int = 0, nested: bool = False) -> Image.Image:
    """A picture of random discs, boxes, polygons and lines, which teaches the autoencoder every edge and colour.

    Args:
        index: Number of the picture.
        seed: Another seed, other pictures.
        nested: Draw small rings and bars on top, for fine detail.
    """
    rng = random.Random(f"clutter {seed} {index}")
    image = Image.new("RGB", (SIZE * SUPERSAMPLING,) * 2, _any_colour(rng))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(3, 14)):
        x, y = rng.uniform(0, SIZE), rng.uniform(0, SIZE)
        radius = rng.choice((2, 3, 5, 8, 12, 18)) * rng.uniform(0.7, 1.3)
        kind, colour = rng.choice((*SHAPES, "box", "line", "polygon")), _any_colour(rng)
        if kind == "line":
            end = (x + rng.uniform(-30, 30), y + rng.uniform(-30, 30))
            pen.line(scaled(x, y, *end), fill=colour, width=round(SUPERSAMPLING * rng.uniform(1, 4)))
        elif kind == "box":
            aspect = rng.uniform(0.4, 2.5)
            pen.rounded_rectangle(
                scaled(x - radius, y - radius * aspect, x + radius, y + radius * aspect),
                radius=SUPERSAMPLING * rng.choice((0, 1, 3)),
                fill=colour,
            )
        elif kind == "polygon":
            corners = [(x + radius * rng.uniform(-1, 1), y + radius * rng.uniform(-1, 1)) for _ in range(4)]
            pen.polygon(scaled(*(value for corner in corners for value in corner)), fill=colour)
        else:
            draw_shape(pen, kind, x, y, radius, colour)
    if nested:
        _draw_details(pen, rng)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def _draw_details(pen: ImageDraw.ImageDraw, rng: random.Random) -> None:
    for _ in range(rng.randint(3, 9)):
        x, y, radius = rng.uniform(4, SIZE - 4), rng.uniform(4, SIZE - 4), rng.uniform(2.5, 7)
        if rng.random() < 0.5:
            draw_shape(pen, "circle", x, y, radius, _any_colour(rng))
            draw_shape(pen, "circle", x, y, radius * rng.uniform(0.35, 0.7), _any_colour(rng))
        else:
            half_width, half_height = rng.choice(((1.5, radius), (radius * 1.5, 2), (radius, radius)))
            corners = scaled(x - half_width, y - half_height, x + half_width, y + half_height)
            pen.rectangle(corners, fill=_any_colour(rng))


def blank_picture(background: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty background, still supersampled, and the pen for it."""
    bands = BACKGROUNDS[background]
    side = SIZE * SUPERSAMPLING
    image = Image.new("RGB", (side, side), bands[0])
    pen = ImageDraw.Draw(image)
    for horizon, colour in zip(HORIZONS.get(len(bands), ()), bands[1:], strict=True):
        pen.rectangle((0, horizon * SUPERSAMPLING, side, side), fill=colour)
    return image, pen


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape of radius 1, y downwards."""
    if shape == "square":
        return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    if shape == "triangle":
        return [(0.0, -1.0), (1.05, 0.85), (-1.05, 0.85)]
    if shape == "star":
        radii = (1.1, 0.46)
        angles = [math.pi * (step / 5 - 0.5) for step in range(10)]
        points = [(radii[step % 2], angle) for step, angle in enumerate(angles)]
        return [(radius * math.cos(angle), 0.06 + radius * math.sin(angle)) for radius, angle in points]
    turns = [2 * math.pi * step / 60 for step in range(60)]  # heart
    return [
        (
            math.sin(turn) ** 3 * 1.05,
            -(13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)) / 16 - 0.08,
        )
        for turn in turns
    ]


def _any_colour(rng: random.Random) -> tuple[int, ...]:
    palette = [*COLOURS.values(), *(colour for bands in BACKGROUNDS.values() for colour in bands)]
    return rng.choice(palette) if rng.random() < 0.5 else tuple(rng.randrange(256) for _ in range(3))
