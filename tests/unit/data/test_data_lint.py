"""What ``diffsynth check`` sees in pictures and captions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffsynth.core.data import UnifiedDataset
from diffsynth.core.data.findings import Finding, LintReport, PictureEntry
from diffsynth.core.data.lint import lint_dataset
from diffsynth.core.data.lint_captions import estimated_limit
from diffsynth.core.data.lint_html import write_contact_sheet
from diffsynth.core.data.lint_pictures import dhash, find_bars, group_alike, thumbnail


def photo(seed: int, width: int = 320, height: int = 320) -> Image.Image:
    """Soft blotches of colour with grain."""
    draw = np.random.default_rng(seed)
    blotches = Image.fromarray(draw.integers(0, 255, (8, 8, 3)).astype(np.uint8))
    pixels = np.asarray(blotches.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((pixels + draw.integers(-9, 9, pixels.shape)).clip(0, 255).astype(np.uint8))


def lint(folder: Path, rows: list[dict[str, Any]], **options: Any) -> dict[str, list[Finding]]:
    """Findings by kind."""
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    limits, pictures = options.pop("limits", ()), options.pop("with_pictures", False)
    operator = UnifiedDataset.default_image_operator(max_pixels=1 << 20, **options)
    report = lint_dataset(UnifiedDataset(folder, None, 1, "image", operator), limits=limits, with_pictures=pictures)
    found: dict[str, list[Finding]] = {}
    for finding in report.findings:
        found.setdefault(finding.kind, []).append(finding)
    return found


def rows_of(found: dict[str, list[Finding]], kind: str) -> list[tuple[int, ...]]:
    return [finding.rows for finding in found.get(kind, [])]


def row(name: str, caption: Any = None) -> dict[str, Any]:
    return {"image": name, "prompt": f"caption of {name}" if caption is None else caption}


def test_a_sound_data_set_has_no_findings(tmp_path: Path) -> None:
    for index in range(3):
        photo(index).save(tmp_path / f"{index}.png")
    assert lint(tmp_path, [row(f"{index}.png") for index in range(3)]) == {}


@pytest.mark.parametrize(("kind", "severity", "save"), [
    ("tiny", "warning", lambda path: photo(1, 200, 200).save(path)),
    ("extreme proportions", "warning", lambda path: photo(1, 1200, 300).save(path)),
    ("no colour", "note", lambda path: photo(1).convert("L").save(path)),
    ("transparency", "note", lambda path: _with_hole(photo(1)).save(path)),
    ("unreadable picture", "error", lambda path: path.write_bytes(_half(photo(1)))),
    ("unusable row", "error", lambda path: path.touch()),
])
def test_one_odd_picture_is_found(tmp_path: Path, kind: str, severity: str, save: Callable[[Path], Any]) -> None:
    photo(0).save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    found = lint(tmp_path, [row("a.png"), row("b.png")])
    assert rows_of(found, kind) == [(2,)]
    assert found[kind][0].severity == severity
    assert set(found) <= {kind, "lone bucket"}


def _with_hole(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.paste((0, 0, 0, 0), (10, 10, 90, 90))
    return image


def _half(image: Image.Image) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def test_storage_that_is_converted_is_noted(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(0).save(tmp_path / "turned.jpg", exif=exif)
    photo(1).convert("CMYK").save(tmp_path / "print.jpg")
    photo(2).save(tmp_path / "film.gif", save_all=True, append_images=[photo(3)])
    photo(4).convert("RGBA").save(tmp_path / "opaque.png")
    found = lint(tmp_path, [row(name) for name in ("turned.jpg", "print.jpg", "film.gif", "opaque.png")])
    assert {kind: rows_of(found, kind) for kind in found} == {
        "rotated by EXIF": [(1,)], "CMYK": [(2,)], "animation": [(3,)]}


def test_bars_are_told_from_a_subject_on_a_plain_background() -> None:
    boxed = Image.new("RGB", (256, 256))
    boxed.paste(photo(0, 256, 192), (0, 32))
    assert find_bars(np.asarray(boxed)) == (0.125, 0.125, 0, 0)
    framed = Image.new("RGB", (256, 256), "white")
    framed.paste(photo(0, 206, 256), (50, 0))
    assert find_bars(np.asarray(framed)) == (0, 0, 50 / 256, 0)
    subject = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(subject).ellipse((60, 60, 200, 200), fill="red")
    assert find_bars(np.asarray(subject)) == (0, 0, 0, 0)
    assert find_bars(np.asarray(Image.new("RGB", (256, 256)))) == (0, 0, 0, 0)
    assert find_bars(np.asarray(photo(0, 256, 256))) == (0, 0, 0, 0)


def test_pictures_that_look_alike_are_grouped(tmp_path: Path) -> None:
    for index in range(4):
        photo(index, 400, 300).save(tmp_path / f"{index}.png")
    photo(1, 400, 300).resize((300, 225)).save(tmp_path / "smaller.jpg", quality=60)
    ImageDraw.Draw(marked := photo(2, 400, 300)).rectangle((5, 5, 25, 25), fill="white")
    marked.save(tmp_path / "marked.webp", quality=70)
    names = ["0.png", "1.png", "2.png", "3.png", "smaller.jpg", "marked.webp"]
    assert sorted(rows_of(lint(tmp_path, [row(name) for name in names]), "near-duplicates")) == [(2, 5), (3, 6)]


def test_plain_pictures_of_other_colours_are_not_alike() -> None:
    plain = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "red")]
    groups = group_alike([dhash(image) for image in plain], [np.asarray(image.resize((8, 8))).tobytes()
                                                              for image in plain])
    assert groups == [[0, 2]]


def test_groups_do_not_depend_on_how_candidates_are_found() -> None:
    """Every pair of hashes a few bits apart is found, whichever bits these are."""
    draw = np.random.default_rng(0)
    shapes = [int(draw.integers(0, 1 << 63)) for _ in range(40)]
    near = [shape ^ sum(1 << int(bit) for bit in draw.choice(64, 5, replace=False)) for shape in shapes]
    colours = [bytes(192)] * 80
    assert group_alike([*shapes, *near], colours) == [[index, index + 40] for index in range(40)]


def test_sizes_are_judged_by_what_they_are_trained_at(tmp_path: Path) -> None:
    photo(0, 512, 512).save(tmp_path / "fits.png")
    photo(1, 400, 300).save(tmp_path / "small.png")
    photo(2, 1400, 512).save(tmp_path / "wide.png")
    rows = [row(name) for name in ("fits.png", "small.png", "wide.png")]
    fixed = lint(tmp_path, rows, height=512, width=512)
    assert rows_of(fixed, "enlarged") == [(2,)]
    assert "1.7 times" in fixed["enlarged"][0].message
    assert rows_of(fixed, "much cropped") == [(3,)]
    assert "63% of it is cut away" in fixed["much cropped"][0].message
    dynamic = lint(tmp_path, rows)
    assert set(dynamic) == {"lone bucket"}
    assert len(dynamic["lone bucket"]) == 3


def test_captions_that_are_odd_are_found(tmp_path: Path) -> None:
    for index in range(8):
        photo(index).save(tmp_path / f"{index}.png")
    long = " ".join(f"word{number}" for number in range(100))
    captions = ["a dog", " ", "a dog", "caf\ufffd", long, ["one", "another"], "x"]
    rows = [row(f"{index}.png", caption) for index, caption in enumerate(captions)] + [{"image": "7.png"}]
    found = lint(tmp_path, rows, limits=[estimated_limit(77)])
    assert rows_of(found, "empty caption") == [(2,)]
    assert rows_of(found, "same caption") == [(1, 3)]
    assert rows_of(found, "damaged caption") == [(4,)]
    assert rows_of(found, "no caption") == [(8,)]
    assert found["no caption"][0].severity == "error"
    assert rows_of(found, "long caption") == [(5,)]
    assert "cut: 'word57 word58" in found["long caption"][0].message


def test_files_and_rows_are_matched(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "sub/c.JPG", "sub/.hidden.png"):
        photo(len(name)).save(tmp_path / name)
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    found = lint(tmp_path, [row("a.png"), row("b.png"), row("./a.png"), row("a.png", "other")])
    assert [finding.files for finding in found["file not named"]] == [("sub/c.JPG",)]
    assert rows_of(found, "file named twice") == [(1, 4)]


def test_missing_columns_are_said_with_a_suggestion(tmp_path: Path) -> None:
    photo(0).save(tmp_path / "a.png")
    found = lint(tmp_path, [{"image": "a.png", "promt": "x"}])
    assert "has no column 'prompt'; it has image, promt. Did you mean 'promt'?" in found["missing column"][0].message


def test_contact_sheet_is_one_safe_file(tmp_path: Path) -> None:
    caption = "</div><script>alert('x')</script><img src=http://127.0.0.1/x onerror=alert(1)>"
    name = '"><b>.png'
    report = LintReport("data", 2, 1, [
        Finding("tiny", "warning", f"of {caption}", (1,), (name,)), Finding("no caption", "error", "none", (2,))],
        pictures=[PictureEntry(name, (1,), (8, 8), (caption,), thumbnail(photo(0)))])
    write_contact_sheet(report, tmp_path / "deep" / "report.html")
    html = (tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html
    assert "onerror=alert" not in html.replace("onerror=alert(1)&gt;", "")
    assert "&lt;script&gt;" in html
    assert html.count("<img") == 1
    assert "data:image/jpeg;base64,/9j/" in html
    assert "default-src 'none'" in html
    assert "row 2: no caption: none" in html
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_contact_sheet_shows_pictures_with_problems_first(tmp_path: Path) -> None:
    for index in range(4):
        photo(index, 320 if index != 2 else 100, 320).save(tmp_path / f"{index}.png")
    (tmp_path / "metadata.csv").write_text(
        "image,prompt\n" + "".join(f"{index}.png,{index}\n" for index in range(4)), encoding="utf-8")
    operator = UnifiedDataset.default_image_operator()
    report = lint_dataset(UnifiedDataset(tmp_path, None, 1, "image", operator), with_pictures=True)
    assert [entry.file for entry in report.pictures] == ["2.png", "0.png", "1.png", "3.png"]
    assert all(entry.thumbnail.startswith(b"\xff\xd8") for entry in report.pictures)
    assert report.pictures[0].captions == ("2",)
