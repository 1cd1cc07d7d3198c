"""Operators on pictures: load, resize and crop, flip."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from ..errors import UserError
from .image_file import read_image
from .operators import (
    Chain,
    ForEach,
    Operator,
    PlannedFile,
    RandomOperator,
    RouteByExtension,
    RouteByType,
    ToAbsolutePath,
)


@dataclass(frozen=True)
class LoadImage(Operator):
    """A path as an upright 8-bit sRGB picture without transparency (composited on white)."""

    opens_path: ClassVar[bool] = True

    def apply(self, value: Any) -> Image.Image:
        return read_image(Path(value))

    def plan(self, value: Any) -> PlannedFile:
        base, name = (value.base, value.name) if isinstance(value, PlannedFile) else (None, str(value))
        return PlannedFile(base, name, (), True)


@dataclass(frozen=True)
class ImageCropAndResize(RandomOperator):
    """A picture scaled, keeping its proportions, until it covers the wanted size, and cropped to it.

    Args:
        height: Wanted height in pixels; None, for both, keeps each picture's own size (dynamic resolution).
        width: Wanted width in pixels.
        max_pixels: With dynamic resolution, larger pictures are scaled down to at most this area; smaller ones are
            not scaled. Both are cropped to multiples of the division factors. No effect on a fixed size.
        height_division_factor: The height must be, or is made, a multiple of this.
        width_division_factor: The width must be, or is made, a multiple of this.
        center_crop: Take the middle; otherwise one of four places drawn for each picture.
    """

    purpose: ClassVar[str] = "crop"
    num_variants: ClassVar[int] = 4

    height: int | None = None
    width: int | None = None
    max_pixels: int | None = None
    height_division_factor: int = 1
    width_division_factor: int = 1
    center_crop: bool = True

    def __post_init__(self) -> None:
        for name, factor in self._factors().items():
            if factor < 1:
                raise UserError(f"{name}_division_factor must be at least 1, got {factor}.")
        if (self.height is None) != (self.width is None):
            given, missing = ("width", "height") if self.height is None else ("height", "width")
            raise UserError(f"{given} is given without {missing}; give both, or neither for dynamic resolution.")
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None:
                _require_divisible(name, size, self._factors()[name])
        smallest = self.height_division_factor * self.width_division_factor
        if self.max_pixels is not None and self.max_pixels < smallest:
            raise UserError(f"max_pixels must be at least {smallest}, the smallest picture, got {self.max_pixels}.")

    def _factors(self) -> dict[str, int]:
        return {"height": self.height_division_factor, "width": self.width_division_factor}

    @property
    def is_fixed(self) -> bool:
        return self.height is not None

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture of this size comes out with."""
        if self.height is not None and self.width is not None:
            return self.height, self.width
        new_height, new_width = float(height), float(width)
        if self._is_too_large(height, width):
            assert self.max_pixels is not None
            scale = math.sqrt(self.max_pixels / (height * width))
            new_height, new_width = height * scale, width * scale
        # the small excess keeps an exact multiple when the square root comes out a hair below it
        rows = int(new_height / self.height_division_factor + 1e-9)
        columns = int(new_width / self.width_division_factor + 1e-9)
        if rows == 0 or columns == 0:
            raise UserError(
                f"a picture of height {height} and width {width} cannot be cropped to multiples of "
                f"{self.height_division_factor} and {self.width_division_factor}; use a larger or less narrow picture."
            )
        return rows * self.height_division_factor, columns * self.width_division_factor

    def _is_too_large(self, height: int, width: int) -> bool:
        return self.max_pixels is not None and height * width > self.max_pixels

    def variants(self) -> dict[str, int]:
        return {} if self.center_crop else super().variants()

    def __call__(self, value: Any, draw: Any = None) -> Any:
        return self.apply(value) if self.center_crop else super().__call__(value, draw)

    def apply(self, value: Any) -> Image.Image:
        return self._cover_and_crop(value, 0.5, 0.5)

    def apply_random(self, value: Any, variant: int, generator: torch.Generator | None) -> Image.Image:
        down, right = torch.rand(2, generator=generator).tolist()
        return self._cover_and_crop(value, down, right)

    def plan(self, value: Any) -> Any:
        if isinstance(value, PlannedFile) and value.resizers is not None:
            return PlannedFile(value.base, value.name, (*value.resizers, self), True)
        return value

    def _cover_and_crop(self, image: Image.Image, down: float, right: float) -> Image.Image:
        """``down`` and ``right`` in [0, 1] say how much of the excess is cut away above and at the left."""
        height, width = self.output_size(image.height, image.width)
        if self.is_fixed or self._is_too_large(image.height, image.width):
            scale = max(height / image.height, width / image.width)
            covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
            if covering != image.size:
                image = image.resize(covering, Image.Resampling.LANCZOS)
        left = min(int((image.width - width) * right + 0.5 * (right != 0.5)), image.width - width)
        top = min(int((image.height - height) * down + 0.5 * (down != 0.5)), image.height - height)
        if (left, top, width, height) == (0, 0, image.width, image.height):
            return image
        return image.crop((left, top, left + width, top + height))


def _require_divisible(name: str, size: int, factor: int) -> None:
    if size < 1:
        raise UserError(f"{name} must be at least {factor}, got {size}.")
    if size % factor:
        below, above = size - size % factor, size - size % factor + factor
        nearest = below if below and size - below <= above - size else above
        raise UserError(f"{name} {size} is not divisible by {factor}; the nearest that is: {nearest}.")


@dataclass(frozen=True)
class RandomFlip(RandomOperator):
    """A picture as it is (variant 0) or mirrored left to right (variant 1)."""

    purpose: ClassVar[str] = "flip"
    num_variants: ClassVar[int] = 2
    uses_generator: ClassVar[bool] = False
    keeps_size: ClassVar[bool] = True

    def is_idle(self, variant: int) -> bool:
        return variant == 0

    def apply_random(self, value: Any, variant: int, generator: torch.Generator | None) -> Image.Image:
        return value.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if variant else value


def default_image_operator(
    base_path: str | Path = "",
    max_pixels: int | None = None,
    height: int | None = None,
    width: int | None = None,
    height_division_factor: int = 16,
    width_division_factor: int = 16,
    center_crop: bool = True,
    random_flip: bool = False,
) -> Operator:
    """From a file name, or a list of file names, to pictures ready for a pipeline.

    Args:
        base_path: Folder that the names are relative to, and must not leave; by default that of the data set.
        max_pixels: See ``ImageCropAndResize``, as are the following.
        random_flip: Also produce mirrored variants.
    """
    one = (
        ToAbsolutePath(base_path)
        >> LoadImage()
        >> ImageCropAndResize(height, width, max_pixels, height_division_factor, width_division_factor, center_crop)
    )
    if random_flip:
        one = one >> RandomFlip()
    return RouteByType([(str, one), (list, ForEach(one))])


def fixed_size(operator: Operator) -> tuple[int, int] | None:
    """(height, width) of every picture that leaves the operator, when it does not depend on the picture."""
    if isinstance(operator, ImageCropAndResize):
        return (operator.height, operator.width) if operator.height and operator.width else None
    if isinstance(operator, Chain):
        last = next((step for step in reversed(operator.steps) if not step.keeps_size), None)
        return fixed_size(last) if last is not None else None
    if isinstance(operator, RouteByType | RouteByExtension | ForEach):
        sizes = {fixed_size(child) for child in operator.children()}
        return sizes.pop() if len(sizes) == 1 else None
    return None
