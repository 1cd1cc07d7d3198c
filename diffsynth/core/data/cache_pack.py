"""One pack of a cache: a safetensors file that holds many entries, and is never changed once it has its name.

The tensors of an entry are called ``<key>/<output>``. The metadata hold, for each entry, a checksum over its tensors
and a label that says what made it.
"""

from __future__ import annotations

import json
import math
import uuid
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import UserError
from ..loader.header import DTYPE_NAMES, Entry, read_header
from ..loader.reader import TensorInfo
from ..loader.writer import stream_safetensors

SUFFIX = ".safetensors"
_FIELD = "diffsynth_cache"
_VERSION = 1


class DamagedEntry(Exception):
    """An entry whose content is not what was stored."""


class NewEntry(NamedTuple):
    """What is to be stored: tensors on the CPU by output name, and who made them."""

    tensors: dict[str, torch.Tensor]
    label: str


class Record(NamedTuple):
    """Where the tensors of one entry lie in its pack."""

    tensors: tuple[tuple[str, Entry], ...]
    """Output name and place, by name."""
    checksum: int
    label: str

    @property
    def num_bytes(self) -> int:
        return sum(entry.end - entry.start for _, entry in self.tensors)


@dataclass(frozen=True)
class Pack:
    """A pack and what is in it."""

    path: Path
    num_bytes: int
    written_at: float
    """Time of the file system, in seconds."""
    records: dict[str, Record]


def read_pack(path: Path) -> Pack:
    """What is in a pack, from its header alone.

    Raises:
        UserError: the header is damaged, or is not that of a pack.
        FileNotFoundError: it was merged into another, or removed.
    """
    tensors, metadata, _ = read_header(path)
    checksums = _contents(path, metadata)
    found: dict[str, list[tuple[str, Entry]]] = {key: [] for key in checksums}
    for name, entry in tensors.items():
        key, slash, output = name.partition("/")
        if not slash or key not in found:
            raise UserError(f"{path} holds the tensor {name!r}, which belongs to none of its entries.")
        found[key].append((output, entry))
    records = {key: Record(tuple(sorted(entries, key=lambda named: named[0])), *checksums[key])
               for key, entries in found.items()}
    status = path.stat()
    return Pack(path, status.st_size, status.st_mtime, records)


def _contents(path: Path, metadata: Mapping[str, str]) -> dict[str, tuple[int, str]]:
    """Checksum and label of each entry, as the metadata tell them."""
    try:
        described = json.loads(metadata[_FIELD])
        labels = [str(label) for label in described["labels"]]
        if described["version"] != _VERSION:
            raise ValueError(described["version"])
        return {key: (int(crc), labels[int(label)]) for key, (crc, label) in described["entries"].items()}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is not a pack of a cache of this version.") from error


def write_pack(folder: Path, entries: Mapping[str, NewEntry]) -> Pack:
    """Write a new pack; it appears complete under its name or not at all.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    tensors = {f"{key}/{name}": tensor for key, entry in entries.items() for name, tensor in entry.tensors.items()}
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    checksums = {key: (checksum(entry.tensors), entry.label) for key, entry in entries.items()}
    return _write(folder, infos, tensors.__getitem__, checksums)


def copy_entries(folder: Path, sources: Mapping[str, Pack]) -> Pack:
    """Write a new pack from entries of others, one tensor in memory at a time; bytes are copied as they are.

    Args:
        sources: Key -> the pack that it is copied from.
    Raises:
        UserError: the disk is full or the folder cannot be written.
        FileNotFoundError: a source is gone.
    """
    places = {f"{key}/{name}": (pack.path, entry) for key, pack in sources.items()
              for name, entry in pack.records[key].tensors}
    infos = {name: TensorInfo(entry.shape, entry.dtype) for name, (_, entry) in places.items()}
    checksums = {key: (pack.records[key].checksum, pack.records[key].label) for key, pack in sources.items()}

    def read(name: str) -> torch.Tensor:
        path, entry = places[name]
        return read_tensors(path, [(name, entry)])[name]

    return _write(folder, infos, read, checksums)


def _write(
    folder: Path, infos: Mapping[str, TensorInfo], make: Callable[[str], torch.Tensor],
    checksums: Mapping[str, tuple[int, str]],
) -> Pack:
    labels = sorted({label for _, label in checksums.values()})
    number = {label: index for index, label in enumerate(labels)}
    described = {"version": _VERSION, "labels": labels,
                 "entries": {key: [crc, number[label]] for key, (crc, label) in sorted(checksums.items())}}
    path = folder / f"{uuid.uuid4().hex}{SUFFIX}"
    written: list[Pack] = []
    # read before it takes its name: afterwards another process may merge it at any time
    stream_safetensors(path, infos, make, {_FIELD: json.dumps(described, separators=(",", ":"))},
                       check=lambda unnamed: written.append(read_pack(unnamed)))
    return replace(written[0], path=path)


def read_entry(pack: Path, record: Record) -> dict[str, torch.Tensor]:
    """The tensors of one entry; nothing else of the pack is read.

    Raises:
        DamagedEntry: the bytes are not those that were stored.
        OSError: the pack is gone, or cannot be read.
    """
    tensors = read_tensors(pack, record.tensors)
    if checksum(tensors) != record.checksum:
        raise DamagedEntry("its checksum is wrong")
    return tensors


def read_tensors(pack: Path, places: Iterable[tuple[str, Entry]]) -> dict[str, torch.Tensor]:
    """Tensors by name. Plain reads: a mapped file that shrinks would end the process."""
    tensors: dict[str, torch.Tensor] = {}
    # opened for each entry: no handle crosses into another process, and no removed pack is kept alive
    with pack.open("rb", buffering=0) as file:
        for name, entry in places:
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            if tensor.numel():
                view = tensor.view(-1).view(torch.uint8).numpy().data
                file.seek(entry.start)
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise DamagedEntry("the pack is shorter than its header says")
                    done += count
            tensors[name] = tensor
    return tensors


def checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    """CRC-32 over names, shapes, dtypes and bytes; 2 GB/s, so that every read can afford it."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name}|{DTYPE_NAMES[tensor.dtype]}|{list(tensor.shape)}|".encode(), crc)
        if math.prod(tensor.shape):
            crc = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, crc)
    return crc
