"""Which runs use which entries of a cache, so that what no run uses can be told and removed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..loader.writer import replace_file
from .claims import Claims, SignOfLife, lives

REMOVAL = "removal"
"""Claim of a process that removes entries; runs that begin wait for it."""
_KEY_LETTERS = 16
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Use:
    """The entries of one run's data set, or of several runs with the same."""

    path: Path
    run: str
    """Output folder of the run that was the last to write this."""
    keys: frozenset[str]
    """Beginnings of the entries' keys; see ``short``."""
    last_used: float
    """Time of the file system, in seconds; renewed while a run is in progress."""
    in_progress: bool


def short(key: str) -> str:
    """What a use notes of a key: enough to tell a billion entries apart."""
    return key[:_KEY_LETTERS]


def claims_folder(root: Path) -> Path:
    return root / "claims"


def uses_folder(root: Path) -> Path:
    return root / "uses"


def register_use(root: Path, keys: Collection[str], run: str) -> SignOfLife:
    """Note that a run uses these entries, from now until the result's ``end``, and wait while entries are removed.

    Args:
        run: Its output folder, for people.
    Raises:
        OSError, UserError: the folder cannot be written.
    """
    noted = sorted({short(key) for key in keys})
    digest = hashlib.blake2b("".join(noted).encode(), digest_size=10).hexdigest()
    path = uses_folder(root) / f"{digest}.json"
    with replace_file(path) as file:
        file.write(json.dumps({"run": run, "keys": noted}, separators=(",", ":")).encode())
    sign = SignOfLife(claims_folder(root), use=digest)
    sign.kept_fresh.append(path)
    # whoever removes entries claims that first and then looks for signs of life: one of the two sees the other
    claims = Claims(sign)
    while claims.is_held(REMOVAL):
        time.sleep(_POLL_SECONDS)
    return sign


def read_uses(root: Path) -> list[Use]:
    """Every use that is noted; one that cannot be read counts as a use of nothing."""
    alive = {str(life.details.get("use")) for life in lives(claims_folder(root)).values() if life.is_alive}
    found = []
    for path in sorted(uses_folder(root).glob("*.json")):
        try:
            noted = json.loads(path.read_text(encoding="utf-8"))
            keys = frozenset(str(key) for key in noted["keys"])
            run = str(noted["run"])
        except (OSError, ValueError, TypeError, KeyError):
            keys, run = frozenset(), "unreadable"
        found.append(Use(path, run, keys, path.stat().st_mtime, path.stem in alive))
    return found
