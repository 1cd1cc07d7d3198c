"""Content hashes of files, remembered between runs so that unchanged files are not read again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from ..loader.writer import replace_file

logger = logging.getLogger(__name__)

_BYTES_AT_ONCE = 1 << 20
_LARGE_PART = 64 << 20
_THREADS = 8
_FINE_CLOCK_NS = 100_000_000
_COARSE_CLOCK_NS = 3_000_000_000
_VERSION = 1


class Seen(NamedTuple):
    """What tells that a file is the one that was hashed. A program may set the modification time, not the change
    time; a file that took another's name has another inode."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Seen:
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def is_settled(self, now_ns: int) -> bool:
        """Whether a later change would show: one within the same tick of the file system's clock does not."""
        whole_seconds = self.ctime_ns % 1_000_000_000 == 0
        tick = _COARSE_CLOCK_NS if whole_seconds else _FINE_CLOCK_NS
        return now_ns - max(self.mtime_ns, self.ctime_ns) > tick


class FileHashes:
    """Path -> hash, as far as it is known and the file is unchanged."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Seen, str]] = {}
        self._learnt: dict[str, tuple[Seen, str]] = {}

    def get(self, path: Path, status: os.stat_result) -> str | None:
        known = self._known.get(str(path))
        return known[1] if known is not None and known[0] == Seen.of(status) else None

    def set(self, path: Path, status: os.stat_result, digest: str) -> None:
        """Note a hash; ``status`` is from before the file was read."""
        entry = Seen.of(status), digest
        self._known[str(path)] = entry
        if entry[0].is_settled(time.time_ns()):
            self._learnt[str(path)] = entry

    def recall(self, memory: Path) -> None:
        """Take over what an earlier run wrote; a damaged file is as good as none."""
        self._known = {**_read(memory), **self._known}

    def save(self, memory: Path) -> None:
        """Write what was learnt since, together with what is there.

        Raises:
            UserError: the place cannot be written.
        """
        if not self._learnt:
            return
        merged = {**_read(memory), **self._learnt}
        files = {path: [*seen, digest] for path, (seen, digest) in merged.items()}
        with replace_file(memory) as file:
            file.write(json.dumps({"version": _VERSION, "files": files}, separators=(",", ":")).encode())
        self._learnt = {}


def _read(memory: Path) -> dict[str, tuple[Seen, str]]:
    try:
        found = json.loads(memory.read_text(encoding="utf-8"))
        if found["version"] != _VERSION:
            return {}
        return {path: (Seen(*map(int, seen)), str(digest)) for path, (*seen, digest) in found["files"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        logger.info("%s cannot be read (%s); the files are read again.", memory, error)
        return {}


def hash_file(path: Path, size: int) -> str:
    """A hash of everything in a file. Large files are read by several threads, in parts of a fixed size.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if size <= _LARGE_PART:
            return _hash_part(path, 0).hex()
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            parts = list(pool.map(lambda start: _hash_part(path, start), range(0, size, _LARGE_PART)))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    return hashlib.blake2b(b"".join(parts), digest_size=20).hexdigest()


def _hash_part(path: Path, start: int) -> bytes:
    digest = hashlib.blake2b(digest_size=20)
    left = _LARGE_PART
    with path.open("rb") as file:
        file.seek(start)
        while left and (chunk := file.read(min(left, _BYTES_AT_ONCE))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.digest()


def hash_files(paths: Iterable[Path], hashes: FileHashes) -> str:
    """One hash over the content of several files, whatever their names and order."""
    digests = []
    for path in paths:
        status = path.stat()
        digest = hashes.get(path, status)
        if digest is None:
            digest = hash_file(path, status.st_size)
            hashes.set(path, status, digest)
        digests.append(digest)
    return hashlib.blake2b("".join(sorted(digests)).encode(), digest_size=20).hexdigest()
