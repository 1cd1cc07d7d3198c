"""Rows with several captions, and rows that are left out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffsynth.core.data import UnifiedDataset
from diffsynth.core.data.rows import BadRow
from diffsynth.core.errors import UserError


def join(captions: list[str]) -> str:
    return " + ".join(captions)


@pytest.fixture
def folder(tmp_path: Path, quadrants: Image.Image) -> Path:
    for name in "abc":
        quadrants.save(tmp_path / f"{name}.png")
    return tmp_path


def open_rows(folder: Path, prompts: list[Any], **options: Any) -> UnifiedDataset:
    rows = [{"image": f"{name}.png", "prompt": prompt} for name, prompt in zip("abc", prompts, strict=False)]
    (folder / "metadata.json").write_text(json.dumps(rows), encoding="utf-8")
    operator = UnifiedDataset.default_image_operator(height=32, width=32, random_flip=options.pop("flip", False))
    return UnifiedDataset(folder, None, data_file_keys="image", main_data_operator=operator, **options)


def test_each_epoch_draws_one_caption_for_an_item(folder: Path) -> None:
    dataset = open_rows(folder, [["one", "two", "three"], "only", ["x"]], repeat=2, seed=5)
    assert [len(dataset.variants(item)) for item in range(6)] == [3, 1, 1] * 2
    drawn = Counter(dataset.load(0, dataset.variant(0, epoch))["prompt"] for epoch in range(600))
    assert set(drawn) == {"one", "two", "three"}
    assert min(drawn.values()) > 160
    assert {dataset.load(1, dataset.variant(1, epoch))["prompt"] for epoch in range(9)} == {"only"}
    # the second round of the data set draws its own
    assert any(dataset.variant(0, epoch) != dataset.variant(3, epoch) for epoch in range(20))
    assert any(dataset.variant(0, epoch) != dataset.variant(6, epoch) for epoch in range(20))
    again = open_rows(folder, [["one", "two", "three"], "only", ["x"]], repeat=2, seed=5)
    assert [again.variant(0, epoch) for epoch in range(20)] == [dataset.variant(0, epoch) for epoch in range(20)]
    other = open_rows(folder, [["one", "two", "three"], "only", ["x"]], repeat=2, seed=6)
    assert [other.variant(0, epoch) for epoch in range(20)] != [dataset.variant(0, epoch) for epoch in range(20)]


def test_caption_and_flip_are_drawn_apart(folder: Path) -> None:
    dataset = open_rows(folder, [["one", "two"], "only"], flip=True)
    assert dataset.num_variants == 2
    assert [len(dataset.variants(item)) for item in range(2)] == [4, 2]
    seen = {(sample["prompt"], sample["image"].getpixel((2, 2))) for sample in map(dataset.load, [0] * 4, range(4))}
    assert len(seen) == 4
    assert len({dataset.variant(0, epoch) for epoch in range(60)}) == 4
    # the flips of a row do not depend on how many captions it has
    single = open_rows(folder, ["one", "only"], flip=True)
    assert [dataset.variant(0, epoch) % 2 for epoch in range(40)] == [single.variant(0, epoch) for epoch in range(40)]


def test_fingerprint_tells_captions_apart_and_nothing_else(folder: Path) -> None:
    dataset = open_rows(folder, [["one", "two"], "two"], flip=True)
    prints = [dataset.fingerprint(0, variant) for variant in dataset.variants(0)]
    assert [found["prompt"] for found in prints] == ["one", "one", "two", "two"]
    assert prints[0]["image"] == prints[2]["image"] != prints[1]["image"] == prints[3]["image"]
    assert dataset.fingerprint(1)["prompt"] == "two"
    with pytest.raises(ValueError, match=r"variant must be in \[0, 2\), got 2"):
        dataset.fingerprint(1, 2)


@pytest.mark.parametrize("prompt", [None, 3, [], ["a", None], {"en": "a"}])
def test_what_is_no_caption_is_a_bad_row(folder: Path, prompt: Any) -> None:
    dataset = open_rows(folder, ["fine", prompt])
    (bad,) = dataset.bad_rows("files", ["prompt"])
    assert (bad.row, bad.column) == (2, "prompt")
    assert "write one caption as text, or a list of captions" in bad.reason
    if isinstance(prompt, list):
        with pytest.raises(UserError, match="row 2, column 'prompt': holds"):
            dataset.load(1)


def test_an_operator_for_the_captions_gets_the_whole_list(folder: Path) -> None:
    dataset = open_rows(folder, [["one", "two"]], special_operator_map={"prompt": join})
    assert len(dataset.variants(0)) == 1
    assert dataset.load(0)["prompt"] == "one + two"
    assert dataset.bad_rows("files", ["prompt"]) == []


def test_items_are_numbered_over_the_rows_that_stay(folder: Path) -> None:
    dataset = open_rows(folder, ["a", None, "c"], repeat=2)
    dataset.exclude(dataset.bad_rows("pixels", ["prompt"]))
    assert (dataset.num_rows, len(dataset)) == (2, 4)
    assert [dataset[item]["prompt"] for item in range(4)] == ["a", "c", "a", "c"]
    assert [dataset.row_number(item) for item in range(4)] == [0, 2, 0, 2]
    assert dataset.bad_rows("pixels", ["prompt"]) == []
    (folder / "a.png").write_bytes(b"x")
    dataset.exclude(dataset.bad_rows("pixels"))
    assert [bad.row for bad in dataset.excluded or ()] == [1, 2]
    assert dataset[0]["prompt"] == "c"
    with pytest.raises(UserError, match="none of the 3 rows can be trained on; row 1"):
        dataset.exclude([BadRow(3, "image", "gone")])


def test_a_refusal_names_twenty_rows_and_counts_the_rest(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text(
        "image,prompt\n" + "".join(f"{index}.png,x\n" for index in range(30)), encoding="utf-8")
    dataset = UnifiedDataset(tmp_path, data_file_keys="image",
                             main_data_operator=UnifiedDataset.default_image_operator())
    with pytest.raises(UserError) as caught:
        dataset.check()
    message = str(caught.value)
    assert "29 more rows have problems" in message
    assert message.count("does not exist") == 20
    assert "[row 20, column" in message
    assert "and 10 that are not listed" in message
