"""Data set folders for the tests of ``diffsynth.core.data``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def quadrants() -> Image.Image:
    """48 wide, 32 high; every corner of another colour, so that any turn or mirroring shows."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :24] = (220, 30, 30)
    pixels[:16, 24:] = (30, 200, 30)
    pixels[16:, :24] = (30, 30, 210)
    pixels[16:, 24:] = (230, 220, 40)
    return Image.fromarray(pixels)


@pytest.fixture
def write_dataset(tmp_path: Path, quadrants: Image.Image) -> Callable[..., Path]:
    """Write ``metadata.csv`` with the given text beside the pictures that it needs; returns the folder."""

    def write(metadata: str, *pictures: str, folder: str = "data") -> Path:
        base = tmp_path / folder
        base.mkdir(exist_ok=True)
        (base / "metadata.csv").write_text(metadata, encoding="utf-8")
        for name in pictures:
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            quadrants.save(base / name)
        return base

    return write
