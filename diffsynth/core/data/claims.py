"""Sharing work between processes through a folder: who is alive, and who does what.

A process that takes part shows a *sign of life*, a file whose time it renews every few seconds. A *claim* is a file
that only one process can have created and that names its owner's sign of life. The claim of a process that ended is
void: at once on the machine where it ran, elsewhere when its sign of life has grown old. Takers-over create the claim's
next generation, which again only one can, so that nobody ever removes the claim of another that is alive.

Nothing is needed but that a file can be created exclusively: no locks, no process group, no common clock (the time is
that of the file system).
"""

from __future__ import annotations

import json
import os
import platform
import re
import threading
import time
import uuid
import weakref
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

HEARTBEAT_SECONDS = 3.0
STALE_SECONDS = 30.0
"""A sign of life older than this belongs to a process that ended."""
_SUFFIX = ".alive"
_REMEMBERED_SECONDS = 0.2
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9_-]")


class Life(NamedTuple):
    """What a sign of life says."""

    is_alive: bool
    details: dict[str, Any]


class SignOfLife:
    """The file that says this process is at work in ``folder``; removed by ``end``, with this object, or at exit.

    Args:
        details: Written into the file for others to read.
    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, **details: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.name = f"{_NOT_PLAIN.sub('_', platform.node())}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.path = folder / f"{self.name}{_SUFFIX}"
        self.kept_fresh: list[Path] = []
        """Further files whose time is renewed with this one's."""
        owner = {"machine": _machine(), "pid": os.getpid(), "born": _born(os.getpid())}
        self._text = json.dumps({**details, **owner})
        self.path.write_text(self._text, encoding="utf-8")
        self._offset = 0.0
        self._renew()
        stop = threading.Event()
        # the thread must not keep this object alive
        threading.Thread(target=_renew_until, args=(weakref.ref(self), stop), daemon=True).start()
        self.end = weakref.finalize(self, _end, self.path, stop, os.getpid())
        self._known: dict[str, tuple[float, Life]] = {}

    def now(self) -> float:
        """The time by the file system's clock."""
        return time.monotonic() + self._offset

    def _renew(self) -> None:
        if not self.path.exists():  # taken for dead, as after a night in which the machine was asleep
            self.path.write_text(self._text, encoding="utf-8")
        for path in (self.path, *self.kept_fresh):
            os.utime(path)
        self._offset = self.path.stat().st_mtime - time.monotonic()

    def is_alive(self, name: str) -> bool:
        """Whether the process with this sign of life is still at work."""
        asked = time.monotonic()
        known = self._known.get(name)
        if known is None or asked - known[0] > _REMEMBERED_SECONDS:
            known = self._known[name] = asked, read_life(self.folder / f"{name}{_SUFFIX}", self.now())
        return known[1].is_alive


def _renew_until(sign: weakref.ref[SignOfLife], stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        alive = sign()
        if alive is None:
            return
        try:
            alive._renew()
        except OSError:
            # the folder is gone or out of reach for now: others will take the work over, which harms nobody
            stop.wait(HEARTBEAT_SECONDS)
        del alive


def _end(path: Path, stop: threading.Event, pid: int) -> None:
    stop.set()
    if os.getpid() == pid:  # not in a child that was forked
        _remove(path)


def lives(folder: Path) -> dict[str, Life]:
    """Every sign of life in a folder. Those of processes that ended are removed."""
    found: dict[str, Life] = {}
    now = _time_of(folder) if folder.is_dir() else 0.0
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        found[path.stem] = life = read_life(path, now)
        if not life.is_alive:
            _remove(path)
    return found


def _time_of(folder: Path) -> float:
    """The time by the clock of a folder's file system; by this machine's, if the folder cannot be written."""
    probe = folder / f".{uuid.uuid4().hex}.time"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        _remove(probe)


def read_life(path: Path, now: float) -> Life:
    """What a sign of life says at the time ``now``."""
    try:
        with path.open(encoding="utf-8") as file:  # opening makes network file systems ask for the file's real time
            age = now - os.fstat(file.fileno()).st_mtime
            details = json.loads(file.read() or "{}")
    except FileNotFoundError:
        return Life(False, {})
    except ValueError:
        details, age = {}, STALE_SECONDS + 1
    if not isinstance(details, dict):
        return Life(False, {})
    is_alive = age <= STALE_SECONDS
    if is_alive and details.get("machine") == _machine() and isinstance(details.get("pid"), int):
        is_alive = _runs(details["pid"], details.get("born"))
    return Life(is_alive, details)


class Claims:
    """Claims of one process in the folder of its sign of life.

    Args:
        sign: Of this process.
    """

    def __init__(self, sign: SignOfLife) -> None:
        self.sign = sign
        self._held: dict[str, int] = {}

    def take(self, name: str) -> bool:
        """Claim something; False while another process that is alive has it.

        Raises:
            OSError: the folder cannot be written.
        """
        generation = 0
        while True:
            path = self._path(name, generation)
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                state = self._state(path)
                if state == "held":
                    return False
                generation += state == "void"
                continue
            try:
                os.write(descriptor, self.sign.name.encode("utf-8"))
            finally:
                os.close(descriptor)
            self._held[name] = generation
            return True

    def is_held(self, name: str) -> bool:
        """Whether any process that is alive has this claim."""
        generation = 0
        while (state := self._state(self._path(name, generation))) == "void":
            generation += 1
        return state == "held"

    def release(self, names: Iterable[str]) -> None:
        """Give back what this process holds of these."""
        for name in names:
            for generation in range(self._held.pop(name, -1), -1, -1):
                _remove(self._path(name, generation))

    def release_all(self) -> None:
        self.release(list(self._held))

    def tidy(self) -> None:
        """Remove what killed processes left, if no other process is at work here."""
        others = {name for name, life in lives(self.sign.folder).items() if life.is_alive} - {self.sign.name}
        if others:
            return
        for path in self.sign.folder.iterdir():
            if path.suffix != _SUFFIX and path.stem not in self._held and self._state(path) == "void":
                _remove(path)

    def _path(self, name: str, generation: int) -> Path:
        return self.sign.folder / f"{name}.{generation}"

    def _state(self, path: Path) -> str:
        """``held``, ``void`` (its owner ended) or ``gone`` (given back meanwhile)."""
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                owner = file.read()
                age = self.sign.now() - os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return "gone"
        if not owner:  # just created, or its owner was killed between the two system calls
            return "held" if age <= STALE_SECONDS else "void"
        return "held" if not _NOT_PLAIN.search(owner) and self.sign.is_alive(owner) else "void"


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _runs(pid: int, born: Any) -> bool:
    """Whether a process of this machine still runs, and is not a later one with the same number."""
    if os.name != "posix":  # os.kill with 0 would end it on Windows
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return born == _born(pid)


def _born(pid: int) -> str:
    """When a process was started, in ticks since the machine was; empty where the system does not tell so."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        # the name, in brackets, may hold anything; state is the first field after it, and the time the twentieth
        fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if fields[0] == "Z" else fields[19]


@cache
def _machine() -> str:
    """This machine since it was started, and this container: where process numbers mean the same."""
    parts = [platform.node()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        place = Path(path)
        if place.is_symlink():
            parts.append(str(place.readlink()))
        elif place.is_file():
            parts.append(place.read_text(encoding="utf-8").strip())
    return "|".join(parts)
