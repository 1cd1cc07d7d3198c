"""Writing safetensors so that the old file survives whatever happens, and equal content gives equal bytes."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from ..errors import UserError
from .header import DTYPE_NAMES
from .reader import TensorInfo


def save_safetensors(path: Path | str, tensors: Mapping[str, torch.Tensor],
                     metadata: Mapping[str, str] | None = None, check: Callable[[Path], None] | None = None) -> Path:
    """Write weights; a reader sees the old file or the complete new one.

    The bytes depend on the content alone (the library writes its metadata in random order), and tensors are copied to
    the CPU one at a time.

    Args:
        check: Given the complete file before it takes its name; what it raises leaves the previous file as it was.
    Raises:
        UserError: the disk is full or the place cannot be written; the previous file is untouched, nothing is left.
    """
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return stream_safetensors(path, infos, tensors.__getitem__, metadata, check)


def stream_safetensors(path: Path | str, infos: Mapping[str, TensorInfo], make: Callable[[str], torch.Tensor],
                       metadata: Mapping[str, str] | None = None,
                       check: Callable[[Path], None] | None = None) -> Path:
    """``save_safetensors`` for tensors that are made one after the other, so that memory never holds them all.

    Args:
        infos: Name -> shape and dtype of what ``make`` returns for it.
    """
    with replace_file(path) as file:
        _write(file, infos, make, metadata or {})
        _check(file, check)
    return Path(path)


def save_torch_file(path: Path | str, tensors: Mapping[str, torch.Tensor],
                    check: Callable[[Path], None] | None = None) -> Path:
    """Write weights as programs of the older generation expect them (``.ckpt``); otherwise as ``save_safetensors``."""
    with replace_file(path) as file:
        torch.save(dict(tensors), file)
        _check(file, check)
    return Path(path)


def _check(file: BinaryIO, check: Callable[[Path], None] | None) -> None:
    if check is not None:
        file.flush()
        check(Path(file.name))


@contextmanager
def new_folder(path: Path | str) -> Iterator[Path]:
    """A folder to fill, which takes its name when it is complete; after an error it is gone.

    Raises:
        UserError: something other than an empty folder is in its place, or the place cannot be written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already; choose a new folder.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.is_dir():
            path.rmdir()
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free some space or choose another "
                        "folder.") from error
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


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


class Writable(Protocol):
    """What a weight file is written to."""

    def write(self, data: Any, /) -> object: ...


def write_safetensors(file: Writable, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write the bytes of a safetensors file to something that is open."""
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    _write(file, infos, tensors.__getitem__, metadata)


def _write(file: Writable, infos: Mapping[str, TensorInfo], make: Callable[[str], torch.Tensor],
           metadata: Mapping[str, str]) -> None:
    # widest dtype first, then by name: every tensor starts at a multiple of its element size
    names = sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    position = 0
    for name in names:
        shape, dtype = infos[name]
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for name in names:
        tensor = make(name)
        assert (tuple(tensor.shape), tensor.dtype) == infos[name], f"{name} is not what the header says"
        if tensor.numel():
            flat = tensor.detach().to("cpu").contiguous().reshape(-1)
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
