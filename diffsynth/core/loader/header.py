"""The header of a safetensors file, checked before anything in it is believed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import UserError

MAX_HEADER_BYTES = 2**25
"""Parsed, a hostile header takes thirty times its size; that of 100,000 tensors with long names has half of this."""
MAX_TENSORS = 100_000
MAX_NAME_LENGTH = 1024
MAX_DIMENSIONS = 16
MAX_ELEMENTS = 2**48
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """One tensor of a safetensors file; ``start`` and ``end`` count bytes from the beginning of the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str], bytes]:
    """Read and check the header of a safetensors file.

    Returns:
        Entries in file order, the metadata, and the raw header.
    Raises:
        UserError: the file is truncated, or its header contradicts itself or the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise UserError(f"{path} is not a safetensors file or is truncated: its header claims {length} bytes, "
                            f"the whole file has {size}; download it again.")
        if length > MAX_HEADER_BYTES:
            raise UserError(f"{path} has a header of {length} bytes, and no model needs more than {MAX_HEADER_BYTES}; "
                            "it was refused.")
        raw = file.read(length)
    entries, metadata = parse_header(path, raw, size)
    return entries, metadata, raw


def parse_header(path: Path, raw: bytes, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """What ``read_header`` makes of the header's bytes.

    Args:
        path: For messages.
        raw: The header, without the eight bytes before it that give its length.
        size: Of the whole file.
    """
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_Objects(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} has an unreadable safetensors header ({error}); download it again.") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} has a safetensors header that is no JSON object; download it again.")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path} has safetensors metadata that are not text; download it again.")
    if not all(map(_is_text, (*header, *metadata, *metadata.values()))):
        raise UserError(f"{path} holds half a character (a lone surrogate) in a name; download it again.")
    entries = {key: _entry(path, key, value, 8 + len(raw)) for key, value in header.items()}
    _check_offsets(path, entries, 8 + len(raw), size)
    return entries, metadata


class _Objects:
    """Makes the objects of a header, each name once, and stops when there are too many."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self.count += 1
        if self.count > MAX_TENSORS + 2:
            raise ValueError(f"more than {MAX_TENSORS} tensors")
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found


def _is_text(value: str) -> bool:
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _entry(path: Path, key: str, value: Any, data_start: int) -> Entry:
    if len(key) > MAX_NAME_LENGTH:
        raise UserError(f"{path} holds a tensor whose name has {len(key)} characters ({key[:40]!r}...); it was "
                        "refused.")
    valid = (
        isinstance(value, dict)
        and isinstance(value.get("dtype"), str)
        and _naturals(value.get("shape"), MAX_DIMENSIONS)
        and _naturals(value.get("data_offsets"), 2)
        and len(value["data_offsets"]) == 2
    )
    if not valid:
        raise UserError(f"{path} describes tensor {key!r} in a way that safetensors does not allow; download it again.")
    if value["dtype"] not in DTYPES:
        raise UserError(f"{path} stores tensor {key!r} as {value['dtype'][:20]}, which cannot be read; "
                        f"use a file in one of {', '.join(DTYPES)}.")
    dtype = DTYPES[value["dtype"]]
    start, end = value["data_offsets"]
    # also of a tensor with no element: (0, 10**18) has a size that overflows wherever it is computed
    if math.prod(max(number, 1) for number in value["shape"]) > MAX_ELEMENTS:
        raise UserError(f"{path} gives tensor {key!r} the shape {value['shape']}, which no model has; the header lies, "
                        "download the file again.")
    num_bytes = math.prod(value["shape"]) * dtype.itemsize
    if end - start != num_bytes:
        raise UserError(f"{path} gives tensor {key!r} {end - start} bytes, but shape {value['shape']} in "
                        f"{value['dtype']} needs {num_bytes}; the header lies, download the file again.")
    return Entry(tuple(value["shape"]), dtype, data_start + start, data_start + end)


def _naturals(value: Any, most: int) -> bool:
    return isinstance(value, list) and len(value) <= most and all(
        type(number) is int and 0 <= number < 2**63 for number in value)


def _check_offsets(path: Path, entries: Mapping[str, Entry], data_start: int, size: int) -> None:
    """Tensors must lie end to end and fill the file: no overlap, no hole, no byte missing or left over."""
    position, previous = data_start, None
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < position:
            raise UserError(f"{path} stores tensors {previous!r} and {key!r} in overlapping places; "
                            "the header lies, download the file again.")
        if entry.start > position:
            raise UserError(f"{path} has {entry.start - position} unexplained bytes before tensor {key!r}; "
                            "download the file again.")
        position, previous = entry.end, key
    if position > size:
        raise UserError(f"{path} is truncated: it has {size} bytes and its header promises {position}; "
                        "download it again.")
    if position < size:
        raise UserError(f"{path} has {size - position} bytes after its last tensor; download it again.")
