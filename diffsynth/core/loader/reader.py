"""The one place that opens weight files: safetensors and pickled ones, alone or in shards, without running any code."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import torch

from ..device import is_cpu
from ..errors import UserError
from .header import Entry, read_header
from .pickles import read_checkpoint

SAMPLE_BYTES = 4096
NUM_SAMPLES = 512
WHOLE_BYTES = 64 * 2**20
CHUNK_ELEMENTS = 2**20


class TensorInfo(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightReader:
    """Tensors of one or several files (shards) as one lazy mapping; use it as a context manager.

    Args:
        paths: Weight files. Shards must be given completely (``files.weight_groups`` finds them).
    Raises:
        UserError: a file is missing, empty, truncated, of an unknown format, or tries to run code.
    """

    def __init__(self, paths: Path | str | Sequence[Path | str]) -> None:
        listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
        self.paths = [Path(path) for path in listed]
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._files: list[_SafetensorsFile | _PickleFile] = []
        self._owner: dict[str, _SafetensorsFile | _PickleFile] = {}
        for path in self.paths:
            self._add(_open(path))

    def _add(self, file: _SafetensorsFile | _PickleFile) -> None:
        for key, info in file.tensors.items():
            if key in self.tensors:
                raise UserError(f"weight {key!r} is both in {self._owner[key].path} and in {file.path}; "
                                "these files do not belong together, give only one of them.")
            self.tensors[key] = info
            self._owner[key] = file
        self.metadata.update(file.metadata)
        self._files.append(file)

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files:
            file.close()

    def get(self, key: str) -> torch.Tensor:
        """Read one tensor, on the CPU in the dtype of the file."""
        if key not in self._owner:
            raise UserError(f"{self.describe()} holds no weight {key!r}; it holds {first_keys(self.tensors)}.")
        return self._owner[key].get(key)

    def read_rows(self, key: str, first_row: int, target: torch.Tensor) -> None:
        """Fill ``target`` with rows of a tensor, converted to its dtype and device a few megabytes at a time.

        Args:
            key: Name of the tensor.
            first_row: Where the rows begin along the first dimension.
            target: Contiguous; its size says how many rows are read.
        """
        row = math.prod(self.tensors[key].shape[1:])
        self._owner[key].read_flat(key, first_row * row, target.view(-1))

    def fingerprint(self) -> str:
        """A cheap hash of the content: sizes, headers and evenly sampled bytes; does not depend on names or times."""
        digests = sorted(file.fingerprint() for file in self._files)
        return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()

    def describe(self) -> str:
        """The file's name for messages, or the first shard's and their number."""
        return str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0]} (and {len(self.paths) - 1} more)"


def first_keys(tensors: Mapping[str, Any], count: int = 3) -> str:
    """The first names of a file and how many there are, for messages."""
    if not tensors:
        return "no tensors at all"
    names = ", ".join(repr(key) for key in list(tensors)[:count])
    return f"{len(tensors)} tensors, for example {names}"


def _open(path: Path) -> _SafetensorsFile | _PickleFile:
    if not path.exists():
        raise UserError(f"weight file {path} does not exist; check the path.")
    if not path.is_file():
        raise UserError(f"{path} is a folder where a weight file was expected.")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"weight file {path} is empty (0 bytes); download it again.")
    with path.open("rb") as file:
        start = file.read(64)
    if start[8:9] == b"{":  # first: the length before it may look like the beginning of anything else
        return _SafetensorsFile(path)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is only a git-lfs pointer, not the weights; run `git lfs pull` or download it again.")
    if start.startswith(b"GGUF"):
        raise UserError(f"{path} is a GGUF file, which cannot be read; use the safetensors file of this model.")
    if start.lstrip()[:1] == b"<":
        raise UserError(f"{path} is a web page, not weights; the download failed, repeat it.")
    if start.startswith(b"PK") or start[:1] == b"\x80":
        return _PickleFile(path)
    raise UserError(f"{path} is no weight file that can be read (its first bytes are {start[:8]!r}); "
                    "expected safetensors or a PyTorch checkpoint.")


class _SafetensorsFile:
    """Reads with plain file reads: pages of a memory map would count against peak memory until the file is closed,
    and a file that shrinks meanwhile would end the process instead of raising."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries, self.metadata, self._header = read_header(path)
        self.tensors = {key: TensorInfo(entry.shape, entry.dtype) for key, entry in self._entries.items()}
        self._file: BinaryIO | None = None
        self._scratch: torch.Tensor | None = None

    def get(self, key: str) -> torch.Tensor:
        target = torch.empty(self._entries[key].shape, dtype=self._entries[key].dtype)
        self.read_flat(key, 0, target.view(-1))
        return target

    def read_flat(self, key: str, first: int, target: torch.Tensor) -> None:
        entry: Entry = self._entries[key]
        start = entry.start + first * entry.dtype.itemsize
        if target.dtype == entry.dtype and is_cpu(target.device):
            self._read(key, start, target)
            return
        if self._scratch is None:  # kept: freeing and asking again would fragment the heap between the weights
            self._scratch = torch.empty(CHUNK_ELEMENTS * 8, dtype=torch.uint8)
        scratch = self._scratch.view(entry.dtype)
        for position in range(0, target.numel(), CHUNK_ELEMENTS):
            part = target[position : position + CHUNK_ELEMENTS]
            self._read(key, start + position * entry.dtype.itemsize, scratch[: part.numel()])
            part.copy_(scratch[: part.numel()])

    def _read(self, key: str, start: int, target: torch.Tensor) -> None:
        """Fill a flat CPU tensor with the bytes that begin at ``start`` of the file."""
        if target.numel() == 0:
            return
        if self._file is None:
            self._file = self.path.open("rb", buffering=0)
        view = target.view(torch.uint8).numpy().data
        self._file.seek(start)
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise UserError(f"{self.path} ended while tensor {key!r} was read; it changed meanwhile, try again.")
            done += count

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._scratch = None

    def fingerprint(self) -> str:
        return _sampled_hash(self.path, self._header)


class _PickleFile:
    """A ``torch.save`` file, read by the restricted unpickler only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self._state = read_checkpoint(path)
        self.tensors = {key: TensorInfo(tuple(value.shape), value.dtype) for key, value in self._state.items()}

    def get(self, key: str) -> torch.Tensor:
        return self._state[key].detach()

    def read_flat(self, key: str, first: int, target: torch.Tensor) -> None:
        target.copy_(self._state[key].detach().reshape(-1)[first : first + target.numel()])

    def close(self) -> None:
        self._state = {}

    def fingerprint(self) -> str:
        return _sampled_hash(self.path, b"")


def _sampled_hash(path: Path, header: bytes) -> str:
    """Hash of size, header and bytes sampled evenly; everything for files of a few megabytes."""
    size = path.stat().st_size
    digest = hashlib.blake2b(header + size.to_bytes(8, "little"), digest_size=16)
    stride = SAMPLE_BYTES if size <= WHOLE_BYTES else math.ceil(size / NUM_SAMPLES)
    with path.open("rb") as file:
        for position in [*range(0, size, stride), max(0, size - SAMPLE_BYTES)]:
            file.seek(position)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
