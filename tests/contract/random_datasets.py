"""Data sets drawn at random, each with a list of what is wrong in it, and what must hold of any of them.

The list is made while the files are written, so that it owes nothing to the code that is tested.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffsynth.core.data import UnifiedDataset
from diffsynth.core.errors import UserError
from diffsynth.diffusion.step_plan import Buckets, MicroBatch, RequestedItems, StepPlan, load_windows

LAYOUTS = ("csv", "jsonl", "json", "older csv", "folder")
ROTATED = (2, 3, 4, 5, 6, 7, 8)


@dataclass
class Row:
    """One row as it was written."""

    kind: str
    file: str
    colour: tuple[int, int, int] | None = None
    """What the picture shows; None where that is not to be looked at."""
    size: tuple[int, int] = (0, 0)
    """(height, width), upright."""
    captions: list[str] | None = field(default_factory=lambda: [""])
    """None: the row has none."""
    wrong: str | None = None
    """A word of the reason why it cannot be used."""


@dataclass
class Case:
    """A data set and how it is trained on."""

    number: int
    layout: str
    rows: list[Row]
    height: int | None
    width: int | None
    max_pixels: int
    factor: int
    center_crop: bool
    random_flip: bool
    repeat: int
    batch_size: int
    accumulation: int
    num_processes: int
    steps_per_epoch: int | None
    seed: int
    vanishes: int | None = None
    """Number of a row whose file goes once training has begun."""


def draw_case(number: int, folder: Path) -> Case:
    """Write a data set; everything about it follows from its number."""
    draw = random.Random(number)
    fixed = draw.random() < 0.4
    factor = draw.choice((1, 4, 8))
    case = Case(
        number, draw.choice(LAYOUTS), [], draw.choice((8, 16, 24)) if fixed else None,
        draw.choice((8, 16)) if fixed else None, draw.choice((16 * factor * factor, 4096)), factor,
        draw.random() < 0.5, draw.random() < 0.3, draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 3),
        draw.randint(1, 3), draw.choice((None, None, 1, 2, 5)), draw.randrange(1000))
    writers = _writers(case.layout)
    spoiling = draw.choice((0, 0.1, 0.4))
    for index in range(draw.randint(1, 10)):
        bad = draw.random() < spoiling
        kind = draw.choice([kind for kind, writer in writers.items() if writer.is_bad == bad])
        row = Row(kind, f"{index:02d}.png")
        row.captions = [f"row {index + 1}"]
        if case.layout != "folder" and draw.random() < 0.15:
            row.captions = [""]
        elif case.layout in ("json", "jsonl") and draw.random() < 0.3:
            row.captions = [f"row {index + 1}, caption {choice}" for choice in range(draw.randint(1, 3))]
        writers[kind].write(draw, folder / _inner(case.layout), row, case)
        _spoil_by_size(row, case)
        case.rows.append(row)
    _write_metadata(case, folder / _inner(case.layout))
    lasting = [index for index, row in enumerate(case.rows) if row.wrong is None
               and sum(other.file == row.file for other in case.rows) == 1]
    if len(lasting) > 1 and draw.random() < 0.2:
        case.vanishes = draw.choice(lasting)
    return case


def _inner(layout: str) -> str:
    return "train" if layout == "older csv" else "."


# -- files


@dataclass(frozen=True)
class Writer:
    write: Callable[[random.Random, Path, Row, Case], None]
    is_bad: bool = False


def _solid(draw: random.Random, row: Row, mode: str = "RGB") -> Image.Image:
    grey = draw.randrange(20, 230)
    row.colour = (grey, grey, grey) if mode in ("L", "I;16") else tuple(draw.randrange(20, 230) for _ in range(3))
    row.size = (draw.randint(8, 40), draw.randint(8, 40))
    pixels = np.empty((*row.size, 3), np.uint8)
    pixels[:] = row.colour
    return Image.fromarray(pixels)


def _png(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    _solid(draw, row).save(folder / row.file)


def _jpeg(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    row.file = row.file.replace(".png", ".jpg")
    _solid(draw, row).save(folder / row.file, quality=95, subsampling=0)


def _rotated(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    row.file = row.file.replace(".png", ".JPG")
    image, exif = _solid(draw, row), Image.Exif()
    exif[0x0112] = orientation = draw.choice(ROTATED)
    image.save(folder / row.file, "JPEG", quality=95, subsampling=0, exif=exif)
    if orientation >= 5:
        row.size = (row.size[1], row.size[0])


def _alpha(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    image = _solid(draw, row).convert("RGBA")
    if draw.random() < 0.5:
        image.putalpha(0)
        row.colour = (255, 255, 255)
    image.save(folder / row.file)


def _cmyk(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    row.file = row.file.replace(".png", ".jpg")
    _solid(draw, row).convert("CMYK").save(folder / row.file, quality=95, subsampling=0)


def _grey(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    _solid(draw, row, "L").convert("L").save(folder / row.file)


def _deep_grey(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    grey = np.asarray(_solid(draw, row, "I;16").convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(folder / row.file)


def _palette(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    _solid(draw, row).convert("P", palette=Image.Palette.ADAPTIVE).save(folder / row.file)


def _gif(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    row.file = row.file.replace(".png", ".gif")
    image = _solid(draw, row)
    image.save(folder / row.file, save_all=True, append_images=[Image.new("RGB", image.size, "white")])


def _webp(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    row.file = row.file.replace(".png", ".webp")
    image = _solid(draw, row)
    image.save(folder / row.file, save_all=True, lossless=True,
               append_images=[Image.new("RGB", image.size, "white")])


def _same_again(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    known = [other for other in case.rows if other.wrong is None]
    if not known:
        _png(draw, folder, row, case)
        return
    other = draw.choice(known)
    row.file, row.colour, row.size = other.file, other.colour, other.size


def _missing(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    row.wrong = "does not exist"


def _empty(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    (folder / row.file).touch()
    row.wrong = "is empty"


def _outside(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    row.file, row.wrong = f"../../{row.file}", "outside"


def _text(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    (folder / row.file).write_text("<html>", encoding="utf-8")
    row.wrong = "is not a picture"


def _truncated(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    noise = np.random.default_rng(draw.randrange(1000)).integers(0, 255, (24, 24, 3)).astype(np.uint8)
    row.size = (24, 24)
    Image.fromarray(noise).save(folder / row.file)
    content = (folder / row.file).read_bytes()
    (folder / row.file).write_bytes(content[: draw.randint(len(content) // 2, len(content) * 4 // 5)])
    row.wrong = "is damaged"


def _floating(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    row.file, row.size = row.file.replace(".png", ".tiff"), (24, 24)
    Image.fromarray(np.ones((24, 24), np.float32)).save(folder / row.file)
    row.wrong = "floating-point"


def _no_caption(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    _png(draw, folder, row, case)
    row.captions, row.wrong = None, "caption"


def _foreign_caption(draw: random.Random, folder: Path, row: Row, case: Case) -> None:
    _png(draw, folder, row, case)
    (folder / row.file).with_suffix(".txt").write_bytes(b"\xff\xfe\x00")
    row.captions, row.wrong = None, "not UTF-8"


def _writers(layout: str) -> dict[str, Writer]:
    """Kinds of rows that the layout can hold."""
    found = {write.__name__: Writer(write) for write in (
        _png, _jpeg, _rotated, _alpha, _cmyk, _grey, _deep_grey, _palette, _gif, _webp)}
    bad: list[Any] = [_empty, _text, _truncated, _floating]
    if layout != "folder":
        found["_same_again"] = Writer(_same_again)
        bad += [_missing, _outside]
    if layout in ("json", "jsonl", "folder"):
        bad.append(_no_caption)
    if layout == "folder":
        bad.append(_foreign_caption)
    return found | {write.__name__: Writer(write, is_bad=True) for write in bad}


def _spoil_by_size(row: Row, case: Case) -> None:
    """Dynamic resolution cannot crop a picture that is narrower than the factor."""
    if row.wrong is not None or case.height is not None:
        return
    height, width = row.size
    scale = min(1.0, math.sqrt(case.max_pixels / (height * width)))
    if min(height, width) * scale + 1e-9 < case.factor:
        row.wrong = "cannot be cropped"


def _write_metadata(case: Case, folder: Path) -> None:
    if case.layout == "folder":
        for row in case.rows:
            if row.captions is not None:
                (folder / row.file).with_suffix(".txt").write_text(row.captions[0], encoding="utf-8")
        return
    names = ("file_name", "text") if case.layout == "older csv" else ("image", "prompt")
    objects = []
    for row in case.rows:
        cells: dict[str, Any] = {names[0]: row.file}
        if row.captions is not None:
            cells[names[1]] = row.captions if len(row.captions) > 1 else row.captions[0]
        elif len(objects) % 2:
            cells[names[1]] = None
        objects.append(cells)
    if case.layout.endswith("csv"):
        with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(objects)
    elif case.layout == "json":
        (folder / "metadata.json").write_text(json.dumps(objects), encoding="utf-8")
    else:
        lines = "".join(json.dumps(cells) + "\n" for cells in objects)
        (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")


# -- what must hold


def run_case(number: int, folder: Path) -> Case:
    """Write a data set and go through it as training does; ``AssertionError`` where something is not accounted for."""
    (folder / "data" / "train").mkdir(parents=True)
    case = draw_case(number, folder / "data")
    if case.layout != "older csv":
        (folder / "data" / "train").rmdir()
    dataset = _open(case, folder / "data")
    if "prompt" not in dataset.rows.table.columns:
        assert all(row.captions is None for row in case.rows)
        return case  # refused as a whole
    bad_rows = dataset.bad_rows("pixels", ("prompt",))
    expected = {index + 1: row.wrong for index, row in enumerate(case.rows) if row.wrong is not None}
    assert {bad.row for bad in bad_rows} == set(expected), (case, bad_rows)
    for bad in bad_rows:
        assert str(expected[bad.row]) in bad.reason, (case, bad)
    if bad_rows:
        _assert_refused(dataset, bad_rows)
    if len(bad_rows) == len(case.rows):
        return case
    dataset.exclude(bad_rows)
    assert dataset.num_rows + len(dataset.excluded or ()) == len(case.rows)
    assert len(dataset) == (len(case.rows) - len(expected)) * case.repeat
    buckets = dataset.buckets()
    if case.vanishes is not None:
        (dataset.base_path / case_file(case, case.vanishes)).unlink()
    for epoch in range(2):
        _assert_epoch(case, dataset, buckets, epoch)
    return case


def case_file(case: Case, row: int) -> str:
    return str(Path(_inner(case.layout)) / case.rows[row].file)


def _open(case: Case, folder: Path) -> UnifiedDataset:
    operator = UnifiedDataset.default_image_operator(
        folder, case.max_pixels, case.height, case.width, case.factor, case.factor, case.center_crop, case.random_flip)
    return UnifiedDataset(folder, None, case.repeat, "image", operator, seed=case.seed)


def _assert_refused(dataset: UnifiedDataset, bad_rows: Sequence[Any]) -> None:
    with pytest.raises(UserError) as caught:
        dataset.refuse(bad_rows)
    for bad in bad_rows:
        assert f"row {bad.row}, column" in str(caught.value)
    assert "\n" not in str(caught.value)


def _assert_epoch(case: Case, dataset: UnifiedDataset, buckets: Sequence[Any], epoch: int) -> None:
    """Every item of an epoch is loaded once, by one process, and is what its row says."""
    step_size = case.batch_size * case.accumulation * case.num_processes
    known = KnownBuckets(dataset, buckets)
    runs = []
    for rank in range(case.num_processes):
        plan = StepPlan(Buckets(known), batch_size=case.batch_size, accumulation_steps=case.accumulation,
                        num_processes=case.num_processes, rank=rank, seed=case.seed,
                        steps_per_epoch=case.steps_per_epoch)
        items = RequestedItems(dataset, case.seed, 0.0, skip_bad=case.vanishes is not None)
        runs.append(load_windows(items, plan, epoch, 0, list, 0))
    seen: Counter[int] = Counter()
    lost: Counter[int] = Counter()
    sizes: list[int] = []
    for steps in zip(*runs, strict=True):
        windows = [window for window, _ in steps]
        assert all(window == windows[0] for window in windows), case
        together: Counter[int] = Counter()
        assert len({len(batches) for _, batches in steps}) == 1, case
        for _, batches in steps:
            for batch in batches:
                _assert_batch(case, dataset, batch, epoch, len(windows[0]))
                together.update(batch.items)
                lost.update(bad.item for bad in batch.lost)
                together.update(bad.item for bad in batch.lost)
        assert together == Counter(windows[0]), (case, together, windows[0])
        seen += together
        sizes.append(len(windows[0]))
    _assert_counts(case, seen, lost, sizes, len(dataset), step_size)
    gone = {item for item in seen if dataset.row_number(item % len(dataset)) == case.vanishes}
    assert set(lost) == gone, (case, lost)


def _assert_counts(
    case: Case, seen: Counter[int], lost: Counter[int], sizes: list[int], num_items: int, step_size: int
) -> None:
    assert set(seen.values()) == {1}, (case, seen)
    if case.steps_per_epoch is None:
        assert set(seen) == set(range(num_items)), (case, "an item was left out")
        assert len(sizes) == math.ceil(num_items / step_size)
        assert all(size == step_size for size in sizes[:-1]), (case, sizes)
        return
    assert len(sizes) == case.steps_per_epoch
    rounds = Counter(item % num_items for item in seen)
    times = [rounds[item] for item in range(num_items)]
    assert max(times) - min(times) <= 1, (case, times)


def _assert_batch(case: Case, dataset: UnifiedDataset, batch: MicroBatch, epoch: int, window: int) -> None:
    assert len(batch.items) + len(batch.lost) <= case.batch_size
    assert batch.weight == len(batch.items) / window
    assert len({sample["image"].size for sample in batch.data}) == 1, (case, "pictures of different sizes")
    for item, sample in zip(batch.items, batch.data, strict=False) if batch.items else ():
        row = case.rows[dataset.row_number(item % len(dataset))]
        choices = [caption.strip() for caption in row.captions or ()]
        assert sample["prompt"] in choices, (case, row, sample)
        shown = np.asarray(sample["image"], np.int16)
        assert np.abs(shown - np.array(row.colour)).max() <= 8, (case, row, shown[0, 0])


@dataclass
class KnownBuckets:
    """The data set with the sizes that were read before a file went."""

    dataset: UnifiedDataset
    buckets: Sequence[Any]

    def __len__(self) -> int:
        return len(self.dataset)

    def bucket(self, item: int) -> Any:
        return self.buckets[item]
