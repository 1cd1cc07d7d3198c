"""Small and broken weight files for the loader's tests."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

DATA = Path(__file__).parents[2] / "data"
GOLDEN = DATA / "golden"
FLUX_DIT = GOLDEN / "flux_dit" / "flux1-tiny.safetensors"
FLUX_AE = GOLDEN / "flux_ae" / "ae.safetensors"
CLIP_L = GOLDEN / "clip_l" / "clip_l.safetensors"
T5XXL = GOLDEN / "t5xxl" / "t5xxl_fp16.safetensors"


def real_keys(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published file."""
    listed = json.loads((DATA / "real_keys" / f"{name}.json").read_text(encoding="utf-8"))["keys"]
    return {key: tuple(shape) for key, shape in listed.items()}


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file with any header, true or not."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]], bytes_each: int = 2, dtype: str = "BF16") -> Path:
    """A file of any size with a true header and no data on the disk."""
    header, position = {}, 0
    for key, shape in shapes.items():
        end = position + math.prod(shape) * bytes_each
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    write_raw(path, header)
    os.truncate(path, path.stat().st_size + position)
    return path


def write_weights(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path)
    return path
