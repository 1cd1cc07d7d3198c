"""A report on a data set as one HTML file: pictures inline, no scripts, nothing fetched."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator
from html import escape
from pathlib import Path

from .findings import Finding, LintReport, PictureEntry, shortened

# whatever a caption holds, a browser runs nothing and fetches nothing
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 24px; color: #222; background: #fff; }}
table {{ border-collapse: collapse; margin: 12px 0; }} td, th {{ padding: 3px 12px 3px 0; text-align: left; }}
.sheet {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 14px; margin-top: 18px; }}
.card {{ border: 1px solid #ddd; border-radius: 6px; padding: 10px; overflow-wrap: anywhere; }}
.card img, .none {{ display: block; max-width: 160px; height: 160px; object-fit: contain; margin-bottom: 8px; }}
.none {{ background: #eee; color: #888; text-align: center; line-height: 160px; }}
.card.error {{ border-color: #c22; }} .card.warning {{ border-color: #d90; }}
.name {{ font-weight: 600; }} .caption {{ color: #555; }} ul {{ padding-left: 18px; margin: 6px 0 0; }}
li.error, td.error {{ color: #c22; }} li.warning, td.warning {{ color: #a60; }} li.note, td.note {{ color: #666; }}
</style></head><body>
"""
_FEW = 6  # problems shown on one card


def write_contact_sheet(report: LintReport, path: Path) -> None:
    """Write the report, with a picture of each file and what was found on it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(_lines(report))
    partial.replace(path)


def _lines(report: LintReport) -> Iterator[str]:
    yield _HEAD.format(title=escape(f"diffsynth check {report.dataset}"))
    yield f"<h1>{escape(report.dataset)}</h1>\n"
    shown = f", {len(report.pictures)} of them here" if len(report.pictures) < report.num_pictures else ""
    yield (f"<p>{report.num_rows} rows, {report.num_pictures} pictures{shown}; {report.num_rows_with('error')} rows "
           f"that training refuses, {report.num_rows_with('warning')} with warnings.</p>\n")
    yield "<table><tr><th>problem</th><th>count</th></tr>\n"
    for (severity, kind), count in Counter((found.severity, found.kind) for found in report.findings).items():
        yield f'<tr><td class="{severity}">{escape(kind)}</td><td>{count}</td></tr>\n'
    yield "</table>\n"
    by_file: dict[str, list[Finding]] = {}
    by_row: dict[int, list[Finding]] = {}
    for found in report.findings:
        for name in found.files:
            by_file.setdefault(name, []).append(found)
        for row in found.rows if not found.files else ():
            by_row.setdefault(row, []).append(found)
    loose = [found for found in report.findings if not found.files and not found.rows]
    unseen = {row for entry in report.pictures for row in entry.rows}
    loose += [found for row, listed in sorted(by_row.items()) if row not in unseen for found in listed]
    if loose:
        yield f"<ul>{''.join(map(_finding, loose))}</ul>\n"
    yield '<div class="sheet">\n'
    for entry in report.pictures:
        of_rows = [found for row in entry.rows for found in by_row.get(row, ())]
        yield _card(entry, by_file.get(entry.file, []) + of_rows)
    yield "</div>\n</body></html>\n"


def _card(entry: PictureEntry, findings: list[Finding]) -> str:
    worst = next((name for name in ("error", "warning") if any(f.severity == name for f in findings)), "")
    source = base64.b64encode(entry.thumbnail).decode("ascii")
    picture = (f'<img alt="" loading="lazy" src="data:image/jpeg;base64,{source}">' if source
               else '<div class="none">no picture</div>')
    height, width = entry.size
    rows = f"row{'s' if len(entry.rows) > 1 else ''} {', '.join(map(str, entry.rows[:_FEW]))}"
    captions = "".join(f'<div class="caption">{escape(shortened(caption))}</div>' for caption in entry.captions[:_FEW])
    listed = "".join(map(_finding, findings[:_FEW]))
    return (f'<div class="card {worst}">{picture}<div class="name">{escape(entry.file)}</div>'
            f"<div>{rows}{f', {width}x{height}' if width else ''}</div>{captions}"
            f"{f'<ul>{listed}</ul>' if listed else ''}</div>\n")


def _finding(found: Finding) -> str:
    place = f"row {found.rows[0]}: " if found.rows and not found.files else ""
    return f'<li class="{found.severity}">{escape(f"{place}{found.kind}: {found.message}")}</li>'
