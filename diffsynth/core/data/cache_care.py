"""Looking after a cache folder: merging small packs, counting, checking, removing what nobody uses."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from .cache import CacheStore, pack_names
from .cache_pack import DamagedEntry, Pack, Record, copy_entries, read_entry, read_pack
from .cache_uses import REMOVAL, Use, claims_folder, read_uses, short
from .claims import Claims, SignOfLife

logger = logging.getLogger(__name__)

MERGED_BYTES = 2**30
"""Packs are merged up to this size."""
MERGED_HEADER_BYTES = 8 * 2**20
"""And up to headers of this size, about 50,000 entries; readers refuse those of more than 100,000 tensors."""
SMALL_BYTES = 16 * 2**20
"""Packs below this size are merged whatever the sizes of the others."""
MERGING = "merging"
MANY_PACKS = 16
_POLL_SECONDS = 0.1
_WAIT_SECONDS = 600.0


@dataclass(frozen=True)
class Found:
    """One entry of a cache."""

    key: str
    pack: Pack
    record: Record
    last_used: float
    """When a run that uses it was last in progress; for one that no run has noted, when its pack was written."""
    is_used: bool
    in_progress: bool


@dataclass
class Removal:
    """What was removed, or would be."""

    removed: list[Found] = field(default_factory=list)
    kept: list[Found] = field(default_factory=list)


def merge_packs(folder: Path, claims: Claims, at_least: int = 2) -> int:
    """Merge small packs into larger ones, unless another process does.

    Args:
        folder: Of the packs.
        at_least: Leave things as they are while there are fewer packs that are not full.
    Returns:
        How many packs were merged.
    """
    small = sum(size <= MERGED_BYTES // 2 for size, _ in _sizes(folder).values())
    if small < at_least or not claims.take(MERGING):
        return 0
    merged = 0
    try:
        while chosen := choose_merge(_sizes(folder)):
            merged += len(_merge(folder, chosen))
    except FileNotFoundError as error:
        logger.debug("packs are being merged by another process as well (%s)", error)
    except UserError as error:
        logger.warning("the packs of the cache are left as they are: %s", error)
    finally:
        claims.release([MERGING])
    return merged


def choose_merge(sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Packs to merge next: the smallest, each of the larger ones at most twice as large as those before it together.

    Afterwards sizes at least triple from pack to pack, so that few are left, and what is large is seldom copied again.

    Args:
        sizes: Name -> bytes of the file and of its header.
    """
    ordered = sorted(sizes.items(), key=lambda named: named[1])
    for start in range(len(ordered)):
        chosen: list[str] = []
        total = header = 0
        for name, (size, header_size) in ordered[start:]:
            too_large = total + size > MERGED_BYTES or header + header_size > MERGED_HEADER_BYTES
            if too_large or (chosen and size > max(2 * total, SMALL_BYTES)):
                break
            chosen.append(name)
            total, header = total + size, header + header_size
        if len(chosen) > 1:
            return chosen
    return []


def _merge(folder: Path, names: list[str]) -> list[str]:
    packs = [read_pack(folder / name) for name in names]
    copy_entries(folder, {key: pack for pack in packs for key in pack.records})
    _remove_packs(pack.path for pack in packs)
    return names


def _remove_packs(paths: Iterator[Path] | list[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except PermissionError as error:  # on Windows, while someone reads it; the next merge meets it again
            logger.debug("%s stays for now: %s", path, error)


def _sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Bytes of each pack and of its header; those that vanish meanwhile have been merged by another process."""
    found = {}
    for name in pack_names(folder):
        try:
            with (folder / name).open("rb") as file:
                found[name] = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        except FileNotFoundError:
            logger.debug("pack %s was merged meanwhile", name)
    return found


def survey(store: CacheStore, uses: list[Use]) -> list[Found]:
    """Every entry of a cache, once, with when it was last used."""
    last: dict[str, tuple[float, bool]] = {}
    for use in uses:
        for key in use.keys:
            before = last.get(key, (0.0, False))
            last[key] = max(before[0], use.last_used), before[1] or use.in_progress
    found: dict[str, Found] = {}
    for pack in store.packs.values():
        for key, record in pack.records.items():
            last_used, in_progress = last.get(short(key), (pack.written_at, False))
            found[key] = Found(key, pack, record, last_used, short(key) in last, in_progress)
    return list(found.values())


def find_damage(
    store: CacheStore, progress: Callable[[int], None] = lambda count: None, only: Collection[str] | None = None
) -> list[tuple[Pack, str, str]]:
    """Read every entry, also those that are there twice.

    Args:
        progress: Called with the number of entries read since the last call.
        only: Read these alone.
    Returns:
        Pack, key, and what is wrong, of each damaged entry.
    """
    damage = []
    for pack in store.packs.values():
        for key in pack.records if only is None else pack.records.keys() & set(only):
            try:
                read_entry(pack.path, pack.records[key])
            except (DamagedEntry, OSError) as error:
                if not isinstance(error, FileNotFoundError):  # merged meanwhile: its copy is checked, or will be
                    damage.append((pack, key, str(error)))
            progress(1)
    return damage


def drop_damaged(root: Path, keys: Collection[str]) -> None:
    """Remove those of these entries that are damaged, and packs that cannot be read; both are made anew when needed.

    Raises:
        UserError: another process removes entries, or the folder cannot be written.
    """
    with removing(root):
        store = CacheStore(root)  # others may have merged packs since the damage was found
        by_pack: dict[Path, tuple[Pack, set[str]]] = {}
        for pack, key, _ in find_damage(store, only=keys):
            by_pack.setdefault(pack.path, (pack, set()))[1].add(key)
        _rewrite(by_pack)
        _remove_packs([store.folder / name for name in store.unreadable])


def remove_unused(root: Path, unused_for_days: float | None, max_bytes: float | None, dry_run: bool) -> Removal:
    """Remove entries that no run in progress uses, those that were used the longest ago first.

    Args:
        unused_for_days: Remove what was not used for this long. None: nothing by its age.
        max_bytes: Then remove more until the entries take no more than this. None: as many as there are.
        dry_run: Only say what would be removed.
    Raises:
        UserError: another process removes entries, or the folder cannot be written.
    """
    if dry_run:
        return _choose_removal(root, unused_for_days, max_bytes)
    with removing(root) as claims:
        removal = _choose_removal(root, unused_for_days, max_bytes)
        by_pack: dict[Path, tuple[Pack, set[str]]] = {}
        store = CacheStore(root)
        gone = {found.key for found in removal.removed}
        for pack in store.packs.values():
            if keys := gone & pack.records.keys():
                by_pack[pack.path] = pack, keys
        _rewrite(by_pack)
        left = {short(found.key) for found in removal.kept}
        for use in read_uses(root):
            if not use.in_progress and not use.keys & left:
                use.path.unlink(missing_ok=True)
        claims.release([MERGING])
        merge_packs(root / "packs", claims)
        claims.tidy()
    return removal


def _choose_removal(root: Path, unused_for_days: float | None, max_bytes: float | None) -> Removal:
    found = survey(CacheStore(root), read_uses(root))
    total = sum(entry.record.num_bytes for entry in found)
    oldest = time.time() - unused_for_days * 86400 if unused_for_days is not None else 0.0
    removal = Removal()
    for entry in sorted(found, key=lambda entry: (entry.last_used, entry.key)):
        too_much = max_bytes is not None and total > max_bytes
        if entry.in_progress or not (entry.last_used < oldest or too_much):
            removal.kept.append(entry)
            continue
        removal.removed.append(entry)
        total -= entry.record.num_bytes
    return removal


def _rewrite(by_pack: Mapping[Path, tuple[Pack, set[str]]]) -> None:
    """Write packs anew without some of their entries; those that go as a whole are first, which makes room."""
    for pack, without in sorted(by_pack.values(), key=lambda both: len(both[0].records) - len(both[1])):
        kept = {key: pack for key in pack.records if key not in without}
        if kept:
            copy_entries(pack.path.parent, kept)
        _remove_packs([pack.path])


@contextmanager
def removing(root: Path) -> Iterator[Claims]:
    """Be the only process that removes or merges entries; runs that begin meanwhile wait.

    Raises:
        UserError: another process removes entries, or the folder cannot be written.
    """
    try:
        sign = SignOfLife(claims_folder(root))
    except OSError as error:
        raise UserError(f"the cache {root} cannot be written ({error.strerror}).") from error
    claims = Claims(sign)
    try:
        if not claims.take(REMOVAL):
            raise UserError(f"another process is removing entries of {root}; wait until it is done.")
        give_up = time.monotonic() + _WAIT_SECONDS
        while not claims.take(MERGING):
            if time.monotonic() > give_up:
                raise UserError(f"another process has been merging packs of {root} for {_WAIT_SECONDS:g} seconds; "
                                "try again later.")
            time.sleep(_POLL_SECONDS)
        yield claims
    finally:
        claims.release_all()
        sign.end()
