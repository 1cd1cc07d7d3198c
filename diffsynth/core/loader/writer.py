"""Writing safetensors so that the old file survives whatever happens, and equal content gives equal bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from ..errors import UserError
from .header import DTYPE_NAMES


def save_safetensors(path: Path | str, tensors: Mapping[str, torch.Tensor],
                     metadata: Mapping[str, str] | None = None) -> Path:
    """Write weights; a reader sees the old file or the complete new one.

    The bytes depend on the content alone (the library writes its metadata in random order), and tensors are copied to
    the CPU one at a time.

    Raises:
        UserError: the disk is full or the place cannot be written; the previous file is untouched, nothing is left.
    """
    with replace_file(path) as file:
        _write(file, tensors, metadata or {})
    return Path(path)


def save_torch_file(path: Path | str, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write weights as programs of the older generation expect them (``.ckpt``); otherwise as ``save_safetensors``."""
    with replace_file(path) as file:
        torch.save(dict(tensors), file)
    return Path(path)


@contextmanager
def replace_file(path: Path | str) -> Iterator[BinaryIO]:
    """A file to write to, which takes its name when it is complete and on the disk; after an error it is gone.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch's zip writer turns a full disk into a RuntimeError
        if isinstance(error, RuntimeError) and not isinstance(error.__context__, OSError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot save {path}: {reason}; the previous file, if any, is unchanged. "
                        "Free some space or choose another output folder.") from error
    finally:
        _remove(temporary)


def _write(file: BinaryIO, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    # widest dtype first, then by name: every tensor starts at a multiple of its element size
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    position = 0
    for name in names:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.dtype.itemsize
        dtype, shape = DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for name in names:
        if tensors[name].numel():
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def _remove(path: Path) -> None:
    if path.exists():
        path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every platform lets a folder be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
