"""Files and rows that ``UnifiedDataset`` refuses, each named with its row and column."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffsynth.core.data import (
    Operator,
    ToInt,
    ToStr,
    UnifiedDataset,
)
from diffsynth.core.errors import UserError

Write = Callable[..., Path]
default = UnifiedDataset.default_image_operator


def open_dataset(base: Path, keys="image", operator=None, **options) -> UnifiedDataset:
    operator = operator or default(height=32, width=32)
    return UnifiedDataset(base, data_file_keys=keys, main_data_operator=operator, **options)


def brightness(image: Image.Image) -> float:
    return float(np.asarray(image).mean())


# -- bad input


def _png_header(side: int) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


BAD_FILES = {
    "missing": ("nowhere.png", "does not exist", "files"),
    "missing_folder": ("no/where.png", "does not exist", "files"),
    "zero": ("zero.png", "is empty (0 bytes)", "files"),
    "folder": ("sub", "is a folder", "files"),
    "parent": ("../outside.png", "outside the data set folder", "files"),
    "parent_inside": ("sub/../../outside.png", "outside the data set folder", "files"),
    "absolute": ("{outside}", "outside the data set folder", "files"),
    "link": ("link.png", "outside the data set folder", "files"),
    "linked_folder": ("linked/outside.png", "outside the data set folder", "files"),
    "dangling": ("dangling.png", "does not exist", "files"),
    "sibling": ("../data_other/a.png", "outside the data set folder", "files"),
    "nameless": ("", "names no file", "files"),
    "html": ("html.png", "is not a picture", "headers"),
    "huge": ("huge.png", "pixels and was not decoded", "headers"),
    "truncated": ("truncated.png", "is damaged", "pixels"),
}


@pytest.fixture
def bad_folder(write_dataset: Write, quadrants: Image.Image) -> Path:
    base = write_dataset("", "a.png", "sub/b.png", "../outside.png", "../data_other/a.png")
    quadrants.resize((200, 200)).save(base / "truncated.png")
    content = (base / "truncated.png").read_bytes()
    (base / "truncated.png").write_bytes(content[: len(content) // 2])
    (base / "zero.png").touch()
    (base / "html.png").write_text("<html>", encoding="utf-8")
    (base / "huge.png").write_bytes(_png_header(20_000))
    (base / "link.png").symlink_to(base.parent / "outside.png")
    (base / "linked").symlink_to(base.parent)
    (base / "dangling.png").symlink_to(base / "gone.png")
    return base


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_is_named_with_metadata_row_and_column(bad_folder: Path, kind: str) -> None:
    name, expected, depth = BAD_FILES[kind]
    name = name.format(outside=bad_folder.parent / "outside.png")
    metadata = bad_folder / "metadata.csv"
    metadata.write_text(f"image,prompt\na.png,x\nsub/b.png,y\n{name},z\n", encoding="utf-8")
    dataset = open_dataset(bad_folder)
    attempts = [lambda: dataset[2], lambda: dataset.check(depth), lambda: dataset.check("pixels")]
    if depth == "files":
        attempts.append(lambda: dataset.fingerprint(2))
    if depth != "pixels":
        attempts.append(lambda: open_dataset(bad_folder, operator=default()).bucket(2))
    for attempt in attempts:
        with pytest.raises(UserError) as caught:
            attempt()
        message = str(caught.value)
        assert message.startswith(f"{metadata}, row 3, column 'image': ")
        assert expected in message
        assert "\n" not in message
    assert dataset[0]["image"].size == (32, 32)


def test_links_and_absolute_names_inside_the_folder_are_fine(write_dataset: Write, tmp_path: Path) -> None:
    base = write_dataset("", "real/a.png")
    (base / "b.png").symlink_to(base / "real" / "a.png")
    (base / "folder").symlink_to(base / "real")
    rows = ["b.png", "folder/a.png", "real/../real/a.png", str(base / "real" / "a.png"), "./b.png"]
    (base / "metadata.csv").write_text("image,prompt\n" + "".join(f"{r},x\n" for r in rows), encoding="utf-8")
    (tmp_path / "link_to_data").symlink_to(base)
    for place in (base, tmp_path / "link_to_data"):
        dataset = open_dataset(place)
        dataset.check("pixels")
        assert all(dataset[i]["image"].size == (32, 32) for i in range(len(rows)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
def test_unreadable_file_is_named(write_dataset: Write) -> None:
    base = write_dataset("image,prompt\na.png,x\n", "a.png")
    (base / "a.png").chmod(0)
    with pytest.raises(UserError, match=r"row 1, column 'image': .*a\.png cannot be read: Permission denied"):
        open_dataset(base)[0]


def test_check_counts_the_bad_rows_and_names_the_first(write_dataset: Write) -> None:
    base = write_dataset("image,control,prompt\na.png,a.png,x\ngone.png,a.png,x\na.png,gone.png,x\n", "a.png")
    dataset = open_dataset(base, "image,control")
    with pytest.raises(UserError, match=r"row 2, column 'image': .*gone\.png does not exist.*1 more"):
        dataset.check()
    write_dataset("image,control,prompt\na.png,a.png,x\n", "a.png")
    open_dataset(base, "image,control").check("pixels")


def test_check_sees_files_of_operators_that_cannot_be_planned(write_dataset: Write) -> None:
    base = write_dataset("image,prompt\na.png,x\ngone.png,y\n", "a.png")
    for operator in (len, brightness, ToStr()):
        with pytest.raises(UserError, match="row 2, column 'image'"):
            open_dataset(base, operator=operator).check()


def test_missing_column_lists_what_is_there(write_dataset: Write) -> None:
    base = write_dataset("imgae,prompt\na.png,x\n", "a.png")
    with pytest.raises(UserError) as caught:
        open_dataset(base)
    assert str(caught.value) == (
        f"{base / 'metadata.csv'} has no column 'image'; it has imgae, prompt. Did you mean 'imgae'?"
    )
    with pytest.raises(UserError, match=r"no column 'promt'; it has imgae, prompt\. Did you mean 'prompt'"):
        UnifiedDataset(base).require_columns("imgae", "promt")


def test_older_column_names_are_read_under_the_newer_ones(write_dataset: Write) -> None:
    base = write_dataset("file_name,text\na.png,x\n", "a.png")
    assert open_dataset(base).row(0) == {"image": "a.png", "prompt": "x"}
    assert open_dataset(base, "file_name").row(0) == {"file_name": "a.png", "prompt": "x"}
    base = write_dataset("image,text,prompt\na.png,other,x\n", "a.png")
    assert open_dataset(base).row(0) == {"image": "a.png", "text": "other", "prompt": "x"}


@pytest.mark.parametrize("value", [None, 3, {"path": "a.png"}, [None], ["gone.png"]])
def test_value_that_is_no_file_name_is_refused(write_dataset: Write, value) -> None:
    base = write_dataset("", "a.png")
    (base / "metadata.csv").unlink()
    (base / "m.jsonl").write_text('{"image": "a.png"}\n' + json.dumps({"image": value}), encoding="utf-8")
    dataset = UnifiedDataset(base, base / "m.jsonl", data_file_keys="image", main_data_operator=default())
    for attempt in (lambda: dataset[1], dataset.check):
        with pytest.raises(UserError, match="row 2, column 'image'"):
            attempt()


def test_row_without_any_file_is_refused(write_dataset: Write) -> None:
    base = write_dataset("", "a.png")
    (base / "metadata.csv").unlink()
    rows = [{"image": "a.png", "prompt": "x"}, {"prompt": "y"}]
    (base / "metadata.json").write_text(json.dumps(rows), encoding="utf-8")
    for attempt in (open_dataset(base).check, lambda: open_dataset(base)[1]):
        with pytest.raises(UserError, match=r"row 2, column 'image'.*none of the columns image"):
            attempt()


def test_repeat_must_be_positive(write_dataset: Write) -> None:
    base = write_dataset("image,prompt\na.png,x\n", "a.png")
    with pytest.raises(UserError, match="dataset_repeat must be at least 1, got 0"):
        open_dataset(base, repeat=0)


def test_number_operator_names_the_value(write_dataset: Write) -> None:
    base = write_dataset("image,n\na.png,three\n", "a.png")
    with pytest.raises(UserError, match="row 1, column 'n': 'three' is not a whole number"):
        open_dataset(base, special_operator_map={"n": ToInt()})[0]


def test_operators_must_implement_apply() -> None:
    with pytest.raises(NotImplementedError):
        Operator()("x")
