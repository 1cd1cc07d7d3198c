"""The linter of data sets: every file decoded once, everything found said at once."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from ..errors import did_you_mean
from .dataset import UnifiedDataset
from .findings import Finding, LintReport, PictureEntry
from .image_operators import fixed_size
from .lint_captions import TokenLimit, lint_captions
from .lint_pictures import PictureFacts, examine_picture, group_alike
from .metadata import ABSENT, PICTURE_SUFFIXES
from .operators import PlannedFile
from .row_checks import find_row_problems, in_parallel, planned_pictures
from .rows import CAPTION_COLUMN

TINY_AREA = 256 * 256
"""Pixels below which a picture is called tiny."""
EXTREME_ASPECT = 3.0
MUCH_CROPPED = 1 / 3
"""Share of a picture lost to the crop that is worth a warning."""
MAX_PICTURES = 2000
"""Pictures in a contact sheet; those with problems come first."""

Pictures = dict[PlannedFile, list[int]]
"""Picture -> rows that name it, from 1."""


def lint_dataset(
    dataset: UnifiedDataset, *, limits: Sequence[TokenLimit] = (), required: Sequence[str] = (),
    with_pictures: bool = False, num_threads: int = 0, progress: Callable[[int, int], None] | None = None,
) -> LintReport:
    """Look at every row, caption and file of a data set.

    Args:
        dataset: As it would be trained on; its operators say the sizes.
        limits: Of the text encoders.
        required: Columns that every row must have, besides caption and files.
        with_pictures: Also collect what a contact sheet shows.
        num_threads: That decode; 0 takes one for each core.
        progress: Told how many of how many files were decoded.
    """
    report = LintReport(str(dataset.metadata_path), dataset.num_rows, measured_by=[limit.name for limit in limits])
    has_captions = CAPTION_COLUMN in dataset.rows.table.columns
    columns = dataset.rows.table.columns
    missing = [name for name in dict.fromkeys((CAPTION_COLUMN, *required)) if name not in columns]
    report.findings += [
        Finding("missing column", "error", f"{dataset.metadata_path} has no column {name!r}; it has "
                f"{', '.join(columns)}.{did_you_mean(name, columns)}") for name in missing
    ]
    bad_rows = find_row_problems(dataset.rows, "files", (CAPTION_COLUMN,) if has_captions else (),
                                 [name for name in required if name in columns])
    report.findings += [
        Finding("no caption" if bad.column == CAPTION_COLUMN else "unusable row", "error", bad.reason, (bad.row,))
        for bad in bad_rows
    ]
    pictures = planned_pictures(dataset.rows, {bad.row for bad in bad_rows if bad.column in dataset.data_file_keys})
    report.num_pictures = len(pictures)
    facts: dict[PlannedFile, PictureFacts] = {}
    examine = partial(examine_picture, with_thumbnail=with_pictures and len(pictures) <= MAX_PICTURES)
    for file, seen in zip(pictures, in_parallel(examine, list(pictures), num_threads), strict=True):
        facts[file] = seen
        if progress is not None:
            progress(len(facts), len(pictures))
    report.findings += _lint_pictures(dataset, pictures, facts)
    captions = list(_captions(dataset)) if has_captions else []
    report.findings += lint_captions(captions, limits)
    report.findings += _lint_folder(dataset)
    report.buckets = _count_buckets(pictures, facts)
    report.findings.sort(key=lambda found: (_ORDER[found.severity], found.kind, found.rows))
    if with_pictures:
        report.pictures = _contact_sheet(report, pictures, facts, captions)
    return report


_ORDER = {"error": 0, "warning": 1, "note": 2}


def _captions(dataset: UnifiedDataset) -> Iterator[tuple[int, str]]:
    for number, value in enumerate(dataset.rows.table.columns[CAPTION_COLUMN]):
        if value is not ABSENT:
            for caption in value if isinstance(value, list) else [value]:
                if isinstance(caption, str):
                    yield number + 1, caption


def _lint_pictures(dataset: UnifiedDataset, pictures: Pictures, facts: dict[PlannedFile, PictureFacts]
                   ) -> Iterator[Finding]:
    target = next((fixed_size(dataset.rows.operators[key]) for key in dataset.rows.present_keys), None)
    buckets = Counter(seen.trained_size for file, seen in facts.items() for _ in pictures[file])
    for file, rows in pictures.items():
        seen = facts[file]
        about = partial(Finding, rows=tuple(dict.fromkeys(rows)), files=(file.name,))
        if seen.problem is not None:
            yield about("unreadable picture", "error", seen.problem)
            continue
        if len(set(rows)) > 1:
            yield about("file named twice", "warning", f"{file.name} is named by {len(set(rows))} rows.")
        yield from _lint_storage(seen, about)
        yield from _lint_size(seen, target, about)
        if buckets[seen.trained_size] == 1 and len(buckets) > 1 and target is None and seen.trained_size:
            height, width = seen.trained_size
            yield about("lone bucket", "note", f"{width}x{height}: no other picture comes out with this size.")
    yield from _lint_alike(pictures, facts)


def _lint_storage(seen: PictureFacts, about: Callable[..., Finding]) -> Iterator[Finding]:
    header = seen.header
    assert header is not None
    if header.orientation != 1:
        yield about("rotated by EXIF", "note", f"turned upright (orientation {header.orientation}).")
    if header.is_transparent:
        yield about("transparency", "note", "transparent pixels are laid on white.")
    if header.mode in ("CMYK", "YCCK"):
        yield about("CMYK", "note", "colours are converted from CMYK.")
    if seen.is_colourless:
        yield about("no colour", "note", f"all pixels are grey (stored as {header.mode}).")
    if header.is_animated:
        yield about("animation", "warning", "holds several frames or pages; only the first is used.")
    if any(seen.bars):
        sides = ", ".join(f"{name} {share:.0%}" for name, share in zip(_SIDES, seen.bars, strict=True) if share)
        yield about("bars", "warning", f"bars of one colour: {sides}.")


_SIDES = ("top", "bottom", "left", "right")


def _lint_size(
    seen: PictureFacts, target: tuple[int, int] | None, about: Callable[..., Finding]
) -> Iterator[Finding]:
    height, width = seen.size
    if height * width < TINY_AREA:
        yield about("tiny", "warning", f"{width}x{height} pixels.")
    if max(height / width, width / height) > EXTREME_ASPECT:
        yield about("extreme proportions", "warning", f"{width}x{height} pixels.")
    if target is None:
        return
    scale = max(target[0] / height, target[1] / width)
    if scale > 1:
        yield about("enlarged", "warning",
                    f"{width}x{height} would be enlarged {scale:.1f} times for {target[1]}x{target[0]}.")
    lost = 1 - target[0] * target[1] / (height * width * scale * scale)
    if lost > MUCH_CROPPED:
        yield about("much cropped", "warning", f"{lost:.0%} of it is cut away for {target[1]}x{target[0]}.")


def _lint_alike(pictures: Pictures, facts: dict[PlannedFile, PictureFacts]) -> Iterator[Finding]:
    files = [file for file, seen in facts.items() if seen.problem is None]
    for group in group_alike([facts[file].shape for file in files], [facts[file].colours for file in files]):
        alike = [files[position] for position in group]
        rows = sorted({row for file in alike for row in pictures[file]})
        yield Finding("near-duplicates", "warning", f"{len(alike)} pictures look alike: "
                      f"{', '.join(file.name for file in alike[:8])}{', ...' if len(alike) > 8 else ''}.",
                      tuple(rows), tuple(file.name for file in alike))


def _lint_folder(dataset: UnifiedDataset) -> Iterator[Finding]:
    """Pictures in the folder that no row names."""
    named = {os.path.realpath((file.base or Path()) / file.name)
             for file in planned_pictures(dataset.rows) if "\0" not in file.name}
    folder = dataset.rows.table.folder or dataset.base_path
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent) / name
            is_picture = path.suffix.lower() in PICTURE_SUFFIXES and not name.startswith(".")
            if is_picture and os.path.realpath(path) not in named:
                place = str(path.relative_to(folder))
                yield Finding("file not named", "warning", f"{place} is in the folder, but no row names it.",
                              files=(place,))


def _count_buckets(pictures: Pictures, facts: dict[PlannedFile, PictureFacts]) -> dict[str, int]:
    counts: Counter[tuple[int, int]] = Counter()
    for file, rows in pictures.items():
        if (size := facts[file].trained_size) is not None:
            counts[size] += len(rows)
    return {f"{width}x{height}": count for (height, width), count in counts.most_common()}


def _contact_sheet(
    report: LintReport, pictures: Pictures, facts: dict[PlannedFile, PictureFacts], captions: list[tuple[int, str]]
) -> list[PictureEntry]:
    captions_of: dict[int, list[str]] = {}
    for row, caption in captions:
        captions_of.setdefault(row, []).append(caption)
    worst: dict[str, int] = {}
    for found in report.findings:
        for name in found.files:
            worst[name] = min(_ORDER[found.severity], worst.get(name, len(_ORDER)))
    order = sorted(pictures, key=lambda file: worst.get(file.name, len(_ORDER)))
    entries = []
    for file in order[:MAX_PICTURES]:
        seen = facts[file]
        if seen.problem is None and not seen.thumbnail:
            seen = examine_picture(file, with_thumbnail=True)
        rows = tuple(dict.fromkeys(pictures[file]))
        texts = tuple(caption for row in rows for caption in captions_of.get(row, ()))
        entries.append(PictureEntry(file.name, rows, seen.size, texts, seen.thumbnail))
    return entries
