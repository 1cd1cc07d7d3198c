"""``diffsynth cache stats``, ``verify`` and ``prune``: what is in a cache of encoded data, and keeping it in order."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..core.data.cache import CacheStore
from ..core.data.cache_care import Found, drop_damaged, find_damage, remove_unused, survey
from ..core.data.cache_uses import read_uses, short
from ..core.errors import UserError
from ..core.loader import model_base_path
from .cache_options import CacheFolderOptions, CachePruneConfig, CacheStatsConfig, CacheVerifyConfig
from .check import printable

_EXAMPLES = 20


def report_stats(config: CacheStatsConfig) -> None:
    """Write what ``stats`` finds."""
    found = stats(_folder(config))
    if config.as_json:
        _write_json(found)
        return
    from rich.console import Console

    console = Console(markup=False)
    shown = {
        "entries": f"{found['entries']:,}", "size": _size(found["bytes"]), "packs": found["packs"],
        "used last": found["last_used"] or "never",
        "unused": f"{found['unused_entries']:,} entries, {_size(found['unused_bytes'])}",
        **({"unreadable packs": ", ".join(found["unreadable_packs"])} if found["unreadable_packs"] else {}),
    }
    console.print(_table(f"Cache {found['folder']}", None, [(name, str(value)) for name, value in shown.items()]))
    console.print(_table("Made by", ("unit", "entries", "size", "used last"), [
        (row["made_by"], f"{row['entries']:,}", _size(row["bytes"]), row["last_used"]) for row in found["by_unit"]]))
    console.print(_table("Used by", ("run", "entries", "size", "used last"), [
        (row["run"], f"{row['entries']:,}", _size(row["bytes"]), "in progress" if row["in_progress"] else
         row["last_used"]) for row in found["by_run"]]))


def stats(folder: Path) -> dict[str, Any]:
    """What is in a cache: entries, bytes, packs, by unit and by run."""
    store, uses = CacheStore(folder), read_uses(folder)
    found = survey(store, uses)
    by_label: dict[str, list[Found]] = {}
    sizes: dict[str, int] = {}
    for entry in found:
        by_label.setdefault(entry.record.label or "unknown", []).append(entry)
        sizes[short(entry.key)] = entry.record.num_bytes
    unused = [entry for entry in found if not entry.is_used]
    runs = []
    for use in sorted(uses, key=lambda use: -use.last_used):
        there = [sizes[key] for key in use.keys if key in sizes]
        runs.append({"run": use.run, "entries": len(there), "bytes": sum(there), "last_used": _date(use.last_used),
                     "in_progress": use.in_progress})
    return {
        "folder": str(folder), "entries": len(found), "packs": len(store.packs),
        "bytes": sum(pack.num_bytes for pack in store.packs.values()),
        "last_used": _date(max((use.last_used for use in uses), default=None)),
        "unused_entries": len(unused), "unused_bytes": sum(entry.record.num_bytes for entry in unused),
        "unreadable_packs": sorted(store.unreadable),
        "by_unit": [{"made_by": label, **_sum_of(entries)} for label, entries in sorted(by_label.items())],
        "by_run": runs,
    }


def verify(config: CacheVerifyConfig) -> None:
    """Read every entry, and write which are damaged.

    Raises:
        UserError: there are any, and they are not to be removed.
    """
    from ..diffusion.progress import progress_bar

    folder = _folder(config)
    store = CacheStore(folder)
    total = sum(len(pack.records) for pack in store.packs.values())
    with progress_bar(enabled=True, to_stderr=True) as bar:
        shown = bar.add_task("reading", total=total, loss="")
        damage = find_damage(store, lambda count: bar.advance(shown, count))
    unreadable = sorted(store.unreadable)
    report = {
        "folder": str(folder), "entries": total, "repaired": config.repair,
        "damaged": [{"key": key, "pack": pack.path.name, "made_by": pack.records[key].label, "reason": reason}
                    for pack, key, reason in damage],
        "unreadable_packs": [{"pack": name, "reason": store.unreadable[name]} for name in unreadable],
    }
    if config.repair and (damage or unreadable):
        drop_damaged(folder, {key for _, key, _ in damage})
    if config.as_json:
        _write_json(report)
    else:
        _write_damage(report)
    if (damage or unreadable) and not config.repair:
        packs = f" and {len(unreadable)} packs" if unreadable else ""
        raise UserError(f"{len(damage)} of {total} entries{packs} of the cache {folder} are damaged; remove them with "
                        f"diffsynth cache verify {folder} --repair, and the next run makes them anew.")


def _write_damage(report: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console(markup=False)
    rows = [(entry["key"], entry["made_by"], entry["pack"], entry["reason"]) for entry in report["damaged"]]
    rows += [("all of its entries", "", entry["pack"], entry["reason"]) for entry in report["unreadable_packs"]]
    if rows:
        title = "Damaged, and removed" if report["repaired"] else "Damaged"
        more = len(rows) - _EXAMPLES
        shown = [*rows[:_EXAMPLES], *([(f"and {more} more", "", "", "")] if more > 0 else [])]
        console.print(_table(title, ("entry", "made by", "pack", "what is wrong"), shown))
    else:
        console.print(f"All {report['entries']:,} entries are as they were stored.")


def prune(config: CachePruneConfig) -> None:
    """Remove entries, and write how many.

    Raises:
        UserError: neither an age nor a size is given, or the cache cannot be written.
    """
    if config.unused_for_days is None and config.max_gb is None:
        raise UserError("nothing says what may go; set --unused_for_days to an age in days, or --max_gb to the size "
                        "that may stay.")
    folder = _folder(config)
    most = config.max_gb * 1e9 if config.max_gb is not None else None
    removal = remove_unused(folder, config.unused_for_days, most, config.dry_run)
    report: dict[str, Any] = {
        "folder": str(folder), "dry_run": config.dry_run, "removed": _sum_of(removal.removed),
        "kept": _sum_of(removal.kept), "in_progress": _sum_of(entry for entry in removal.kept if entry.in_progress),
    }
    if not config.dry_run and config.unused_for_days is not None:
        _forget_hashes(folder, config.unused_for_days)
    if config.as_json:
        _write_json(report)
        return
    from rich.console import Console

    rows = [(name, f"{part['entries']:,}", _size(part["bytes"]), part["last_used"]) for name, part in (
        ("would be removed" if config.dry_run else "removed", report["removed"]), ("kept", report["kept"]),
        ("of these in use by a run in progress", report["in_progress"]))]
    Console(markup=False).print(_table(f"Cache {folder}", ("", "entries", "size", "used last"), rows))


def _forget_hashes(folder: Path, unused_for_days: float) -> None:
    """Remove what is remembered of the files of data sets that no run has planned for as long."""
    for path in (folder / "file_hashes").glob("*.json"):
        if time.time() - path.stat().st_mtime > unused_for_days * 86400:
            path.unlink(missing_ok=True)


def _folder(config: CacheFolderOptions) -> Path:
    folder = Path(config.folder) if config.folder else model_base_path() / "cache"
    if not (folder / "packs").is_dir():
        raise UserError(f"{folder} is no cache of encoded data (it has no folder packs/); name the folder that "
                        "--cache_path of the training names.")
    return folder


def _sum_of(entries: Iterable[Found]) -> dict[str, Any]:
    listed = list(entries)
    return {"entries": len(listed), "bytes": sum(entry.record.num_bytes for entry in listed),
            "last_used": _date(max((entry.last_used for entry in listed), default=None))}


def _date(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def _write_json(report: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(report, indent=2, ensure_ascii=True) + "\n")


def _table(title: str, headings: tuple[str, ...] | None, rows: Iterable[tuple[str, ...]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=headings is not None)
    for heading in headings or ("", ""):
        table.add_column(heading, justify="right" if heading in ("entries", "size") else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table
