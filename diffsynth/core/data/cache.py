"""A store of tensors by key, in a few large files that are either complete or absent.

Entries are collected and written together as a *pack* (see ``cache_pack.py``). A pack is never changed: small ones are
merged into a new one, after which they are removed. Who misses a pack looks at the folder again. Several processes,
on several machines, may read and write at once; nothing here needs a lock that the file system would have to know.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..startup import collector_paused
from .cache_pack import SUFFIX, DamagedEntry, NewEntry, Pack, Record, read_entry, read_pack, write_pack

logger = logging.getLogger(__name__)

FORMAT_VERSION = "2"
"""Part of every key; a new number makes all older entries unused."""
FLUSH_SECONDS = 2.0
"""Finished entries are on the disk after this time, so that a killed process loses no more."""
FLUSH_BYTES = 64 * 2**20
"""Finished entries are written when they reach this size."""
FLUSH_ENTRIES = 5_000
"""Finished entries are written when there are so many."""
_LOOKS = 5
_GONE = (errno.ENOENT, errno.ESTALE)


class CacheStore:
    """Tensors by key under one folder.

    Args:
        root: The cache's folder; the packs are in ``packs/`` below it.
        wanted: Keys of interest; what is known of others is not kept in memory. None is all.
    """

    def __init__(self, root: Path, wanted: Collection[str] | None = None) -> None:
        self.root = Path(root)
        self.folder = self.root / "packs"
        self.pending: dict[str, NewEntry] = {}
        """Added, and not yet written."""
        self._pending_bytes = 0
        self._flushed_at = -FLUSH_SECONDS
        self.packs: dict[str, Pack] = {}
        self.unreadable: dict[str, str] = {}
        """Names of the packs that cannot be read -> what is wrong with them."""
        self._place: dict[str, str] = {}
        self._wanted = None if wanted is None else frozenset(wanted)
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        assert not self.pending, "entries that are not written yet cannot go to another process"
        return self.__dict__

    def __len__(self) -> int:
        return len(self._place)

    def has(self, key: str) -> bool:
        """Whether an entry is there, as far as the last look at the folder tells."""
        return key in self._place or key in self.pending

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of an entry.

        Raises:
            UserError: the entry was removed or damaged since the run began.
        """
        if key in self.pending:
            return dict(self.pending[key].tensors)
        for _ in range(_LOOKS):
            name = self._place.get(key)
            if name is not None:
                pack = self.packs[name]
                try:
                    return read_entry(pack.path, pack.records[key])
                except (DamagedEntry, OSError) as error:
                    if getattr(error, "errno", None) in _GONE:
                        self.refresh()  # it was merged into another pack
                        continue
                    raise UserError(f"cache entry {key} in {pack.path} cannot be read ({error}); run diffsynth cache "
                                    f"verify {self.root} --repair, then start again: it is made anew.") from error
            self.refresh()
        raise UserError(f"cache entry {key} is no longer in {self.root}; it was removed since this run began. "
                        "Start again: it is made anew.")

    def put(self, key: str, tensors: dict[str, torch.Tensor], label: str = "") -> None:
        """Store one entry at once, in a pack of its own; see ``add``."""
        self.add(key, tensors, label)
        self.flush()

    def add(self, key: str, tensors: dict[str, torch.Tensor], label: str = "") -> list[str]:
        """Take an entry in; it is written with others, at the latest by ``flush``.

        Args:
            label: What made it, for ``diffsynth cache stats``.
        Returns:
            The keys that are on the disk now and were not before.
        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self.pending[key] = NewEntry(held, label)
        self._pending_bytes += sum(tensor.nbytes for tensor in held.values())
        is_much = self._pending_bytes >= FLUSH_BYTES or len(self.pending) >= FLUSH_ENTRIES
        if is_much or time.monotonic() - self._flushed_at >= FLUSH_SECONDS:
            return self.flush()
        return []

    def flush(self) -> list[str]:
        """Write what was added as a new pack, and return its keys. After an error those entries are forgotten."""
        entries, self.pending, self._pending_bytes = self.pending, {}, 0
        if not entries:
            return []
        try:
            pack = write_pack(self.folder, entries)
        except UserError as error:
            raise cannot_write(self.root, error.__cause__ or error) from error
        self._flushed_at = time.monotonic()
        self._take(pack.path.name, pack)
        return list(entries)

    @collector_paused()
    def refresh(self) -> None:
        """Look at the folder: read the headers of new packs, forget those that are gone."""
        for _ in range(_LOOKS):
            before = pack_names(self.folder)
            for name in before - self.packs.keys() - self.unreadable.keys():
                self._read(name)
            # a listing taken while packs are being merged may miss both the new one and the old ones
            if before == pack_names(self.folder):
                break
        self.unreadable = {name: why for name, why in self.unreadable.items() if name in before}
        if gone := self.packs.keys() - before:
            self.packs = {name: pack for name, pack in self.packs.items() if name not in gone}
            self._place = {}
            for name, pack in self.packs.items():
                self._place.update(dict.fromkeys(pack.records, name))

    def _read(self, name: str) -> None:
        path = self.folder / name
        try:
            self._take(name, read_pack(path))
        except FileNotFoundError:
            logger.debug("pack %s was merged or removed meanwhile", path)
        except (UserError, OSError) as error:
            self.unreadable[name] = str(error)
            logger.warning("%s is left out, and what was in it is made anew (%s) Remove it with: diffsynth cache "
                           "verify %s --repair", path, error, self.root)

    def _take(self, name: str, pack: Pack) -> None:
        if self._wanted is not None:
            records: dict[str, Record] = {key: pack.records[key] for key in pack.records.keys() & self._wanted}
            pack = replace(pack, records=records)
        self.packs[name] = pack
        self._place.update(dict.fromkeys(pack.records, name))


def pack_names(folder: Path) -> set[str]:
    """File names of the packs in a folder, which need not exist."""
    try:
        with os.scandir(folder) as found:
            # files that are still being written begin with a dot
            return {entry.name for entry in found if entry.name.endswith(SUFFIX) and not entry.name.startswith(".")}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def check_cache_folder(root: Path) -> None:
    """Make sure, without writing, that a cache can be made here, or at least read.

    Raises:
        UserError: it can not.
    """
    nearest = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise cannot_write(root, f"{nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK) and not (root / "packs").is_dir():
        raise cannot_write(root, f"no permission to write to {nearest}")


def cannot_write(root: Path, reason: object) -> UserError:
    """The error for a cache that cannot be written, be it full or forbidden."""
    why = getattr(reason, "strerror", None) or reason
    return UserError(f"the cache {root} cannot be written ({why}); what is in it is kept. Free some space, choose "
                     "another folder with --cache_path, or set --cache off.")


def entry_key(*parts: object) -> str:
    """The key of what is made from ``parts``; every part must print the same in every process."""
    text = "\x1f".join(str(part) for part in (FORMAT_VERSION, *parts))
    return hashlib.blake2b(text.encode("utf-8"), digest_size=20).hexdigest()
