"""Data sets: ``UnifiedDataset``, the operators that load and prepare its files, and the batches of an epoch."""

from __future__ import annotations

from .batching import plan_epoch, split_window
from .dataset import UnifiedDataset
from .image_file import MAX_PIXELS
from .image_operators import ImageCropAndResize, LoadImage, RandomFlip, default_image_operator
from .operators import (
    Chain,
    ForEach,
    Identity,
    Operator,
    RandomOperator,
    RouteByExtension,
    RouteByType,
    ToAbsolutePath,
    ToInt,
    ToList,
    ToStr,
)

__all__ = [
    "MAX_PIXELS",
    "Chain",
    "ForEach",
    "Identity",
    "ImageCropAndResize",
    "LoadImage",
    "Operator",
    "RandomFlip",
    "RandomOperator",
    "RouteByExtension",
    "RouteByType",
    "ToAbsolutePath",
    "ToInt",
    "ToList",
    "ToStr",
    "UnifiedDataset",
    "default_image_operator",
    "plan_epoch",
    "split_window",
]
