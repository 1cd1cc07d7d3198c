"""Files that metadata names: kept inside the data set folder, checked in bulk, and hashed by content."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from ..errors import UserError
from .file_hashes import FileHashes, hash_file

MAX_NAME_LENGTH = 4096
_OF_WINDOWS = re.compile(r"[A-Za-z]:[\\/]")
_OF_ANOTHER_MACHINE = re.compile(r"[\\/]{2}")


def path_inside(base: Path, name: str) -> Path:
    """The absolute path of ``name``, which must lie in ``base`` after every ``..`` and symbolic link.

    Raises:
        UserError: the name is empty or cannot be a path, or it leads out of the folder.
    """
    if problem := _name_problem(name):
        raise UserError(problem)
    root = _real_folder(base)
    real = os.path.realpath(os.path.join(root, name))  # noqa: PTH118
    if not _is_below(real, root):
        raise UserError(f"{name!r} leads to {real}, outside the data set folder {base}; only files in it are read.")
    return Path(real)


def _name_problem(name: str) -> str | None:
    """Why a name cannot be that of a file here, told without asking the file system: on Windows, looking for a file of
    another machine sends it the user's name and password."""
    if not name:
        return "names no file; write a path relative to the data set folder."
    if "\0" in name:
        return f"{name[:80]!r} holds a NUL byte and cannot be a file name."
    if len(name) > MAX_NAME_LENGTH:
        return f"{name[:40]!r}... has {len(name)} characters and cannot be a file name."
    if (_OF_WINDOWS.match(name) and os.name != "nt") or _OF_ANOTHER_MACHINE.match(name):
        return (f"{name!r} is a path of Windows or of another machine, outside the data set folder; write one relative "
                "to the folder, with '/'.")
    return None


@lru_cache(maxsize=64)
def _real_folder(base: Path) -> str:
    return os.path.realpath(base)


def _is_below(real: str, root: str) -> bool:
    return real == root or real.startswith(root.rstrip(os.sep) + os.sep)


def find_problems(base: Path, names: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Position and problem of every name that is not a readable, non-empty file inside ``base``.

    Folders are listed once and links followed once, so that a large table costs little more than one look-up a row.
    """
    root = _real_folder(base)
    folders: dict[str, _Folder | None] = {}
    verdicts: dict[str, str | None] = {}
    for position, name in enumerate(names):
        if name not in verdicts:
            verdicts[name] = _problem(base, root, name, folders)
        problem = verdicts[name]
        if problem is not None:
            yield position, problem


class _Folder:
    """One listed folder: its plain files; everything else is looked at one by one."""

    def __init__(self, path: str) -> None:
        with os.scandir(path) as entries:
            self.files = {entry.name: entry for entry in entries if entry.is_file(follow_symlinks=False)}


def _problem(base: Path, root: str, name: str, folders: dict[str, _Folder | None]) -> str | None:
    if problem := _name_problem(name):
        return problem
    head, tail = os.path.split(name)
    if head not in folders:
        real_head = os.path.realpath(os.path.join(root, head))  # noqa: PTH118
        readable = _is_below(real_head, root) and os.path.isdir(real_head)  # noqa: PTH112
        folders[head] = _Folder(real_head) if readable and os.access(real_head, os.R_OK) else None
    folder = folders[head]
    entry = folder.files.get(tail) if folder is not None else None
    if entry is not None:
        return None if entry.stat().st_size else f"{base / name} is empty (0 bytes); replace or remove it."
    try:
        require_file(path_inside(base, name))
    except UserError as error:
        return str(error)
    return None


def require_file(path: Path) -> os.stat_result:
    """The status of a non-empty file.

    Raises:
        UserError: it is missing, a folder, empty or unreadable.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; put the file there or remove the row.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file.")
    if status.st_size == 0:
        raise UserError(f"{path} is empty (0 bytes); replace or remove it.")
    return status


class FileHasher:
    """Content hashes of files, computed once for each state of a file; see ``FileHashes``."""

    def __init__(self) -> None:
        self.hashes = FileHashes()

    def __call__(self, path: Path) -> str:
        status = require_file(path)
        digest = self.hashes.get(path, status)
        if digest is None:
            digest = hash_file(path, status.st_size)
            self.hashes.set(path, status, digest)
        return digest
