"""Samples, variants, fingerprints and buckets of ``UnifiedDataset``."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth.core.data import (
    ForEach,
    ImageCropAndResize,
    LoadImage,
    RandomFlip,
    RandomOperator,
    RouteByExtension,
    RouteByType,
    ToAbsolutePath,
    ToInt,
    ToList,
    ToStr,
    UnifiedDataset,
)
from diffsynth.core.errors import UserError

Write = Callable[..., Path]
default = UnifiedDataset.default_image_operator


def open_dataset(base: Path, keys="image", operator=None, **options) -> UnifiedDataset:
    operator = operator or default(height=32, width=32)
    return UnifiedDataset(base, data_file_keys=keys, main_data_operator=operator, **options)


def image_bytes(image: Image.Image) -> bytes:
    return np.asarray(image).tobytes()


def keep(batch: list) -> list:
    return batch


def brightness(image: Image.Image) -> float:
    return float(np.asarray(image).mean())


# -- samples


def test_script_of_the_newest_page(write_dataset: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_dataset("image,prompt\nimage_1.jpg,a dog\nimage_2.jpg,a cat\n", "image_1.jpg", "image_2.jpg")
    monkeypatch.chdir(base.parent)
    dataset = UnifiedDataset(
        base_path="data",
        metadata_path="data/metadata.csv",
        repeat=50,
        data_file_keys="image",
        main_data_operator=UnifiedDataset.default_image_operator(
            base_path="data", height=512, width=512, height_division_factor=16, width_division_factor=16
        ),
    )
    assert len(dataset) == 100
    assert dataset.num_rows == 2
    sample = dataset[51]
    assert sample["prompt"] == "a cat"
    assert (sample["image"].size, sample["image"].mode) == ((512, 512), "RGB")
    assert dataset.row(51) == {"image": "image_2.jpg", "prompt": "a cat"}
    with pytest.raises(IndexError):
        dataset[100]
    assert dataset[-1]["prompt"] == "a cat"


@pytest.mark.parametrize("keys", ["image,control", " image , control ", ["image", "control"], ("image", "control")])
def test_keys_as_text_or_list(write_dataset: Write, keys) -> None:
    base = write_dataset("image,control,prompt\na.png,b.png,x\n", "a.png", "b.png")
    sample = open_dataset(base, keys)[0]
    assert sample["image"].size == sample["control"].size == (32, 32)
    assert sample["prompt"] == "x"


def test_special_operator_takes_precedence(write_dataset: Write) -> None:
    base = write_dataset("image,control,weight\na.png,b.png,3\n", "a.png", "b.png")
    special = {"control": default(height=16, width=16), "weight": ToInt(), "not_there": ToInt()}
    sample = open_dataset(base, "image,control", special_operator_map=special)[0]
    assert (sample["image"].size, sample["control"].size, sample["weight"]) == ((32, 32), (16, 16), 3)


def test_without_operator_rows_stay_as_they_are(write_dataset: Write) -> None:
    base = write_dataset("image,prompt\na.png,x\n", "a.png")
    assert UnifiedDataset(base, data_file_keys="image")[0] == {"image": "a.png", "prompt": "x"}
    assert UnifiedDataset(base)[0] == {"image": "a.png", "prompt": "x"}


def test_plain_functions_join_a_chain(write_dataset: Write) -> None:
    base = write_dataset("image,prompt\na.png,x\n", "a.png")
    expected = brightness(Image.open(base / "a.png"))
    assert open_dataset(base, operator=ToAbsolutePath() >> LoadImage() >> brightness)[0]["image"] == expected
    assert open_dataset(base, operator=os.path.basename >> ToStr() >> len)[0]["image"] == len("a.png")
    assert open_dataset(base, operator=len)[0]["image"] == 5
    with pytest.raises(UserError, match="is not an operator"):
        open_dataset(base, operator=7)


def test_value_may_be_a_list_of_files(write_dataset: Write) -> None:
    base = write_dataset("", "a.png", "b.png")
    (base / "metadata.csv").unlink()
    rows = [{"image": ["a.png", "b.png"], "prompt": "x"}, {"image": "a.png", "prompt": "y"}]
    (base / "metadata.json").write_text(json.dumps(rows), encoding="utf-8")
    dataset = open_dataset(base)
    dataset.check("pixels")
    assert [image.size for image in dataset[0]["image"]] == [(32, 32), (32, 32)]
    assert dataset[1]["image"].size == (32, 32)
    assert dataset.bucket(0) == (32, 32)
    alone = open_dataset(base, operator=ToList() >> ForEach(default(height=32, width=32)))
    assert len(alone[1]["image"]) == 1
    assert alone.fingerprint(0)["image"] != alone.fingerprint(1)["image"]


def test_routes_choose_by_type_and_extension(write_dataset: Write) -> None:
    base = write_dataset("image,prompt\na.png,x\nb.JPG,y\n", "a.png", "b.JPG")
    by_extension = RouteByExtension(
        [("jpg", ToAbsolutePath() >> LoadImage() >> ImageCropAndResize(16, 16)), (("png", ".webp"), default())]
    )
    dataset = open_dataset(base, operator=by_extension)
    assert [dataset[0]["image"].size, dataset[1]["image"].size] == [(48, 32), (16, 16)]
    assert dataset.buckets() == [(32, 48), (16, 16)]
    with pytest.raises(UserError, match=r"row 1, column 'image': a\.png ends in '\.png'"):
        open_dataset(base, operator=RouteByExtension([("jpg", default())]))[0]
    with pytest.raises(UserError, match=r"row 1, column 'image': 'a\.png' is of type str"):
        open_dataset(base, operator=RouteByType([(int, ToInt())]))[0]


def test_loader_without_a_folder_reads_from_the_data_set(write_dataset: Write) -> None:
    base = write_dataset("image,prompt\na.png,x\n../outside.png,y\n", "a.png", "../outside.png")
    dataset = open_dataset(base, operator=LoadImage() >> ImageCropAndResize(16, 16))
    assert dataset[0]["image"].size == (16, 16)
    with pytest.raises(UserError, match="outside the data set folder"):
        dataset[1]


def test_image_may_be_missing_where_video_is_there(write_dataset: Write) -> None:
    base = write_dataset("image,prompt\na.png,x\n", "a.png")
    assert open_dataset(base, "image,video")[0]["image"].size == (32, 32)
    with pytest.raises(UserError, match="no column 'control'"):
        open_dataset(base, "image,control")


# -- variants


def test_variants_are_bounded_and_deterministic(write_dataset: Write) -> None:
    base = write_dataset("image,prompt\na.png,x\nb.png,y\n", "a.png", "b.png")
    counts = {}
    for crop in (True, False):
        for flip in (True, False):
            operator = default(height=16, width=16, center_crop=crop, random_flip=flip)
            counts[crop, flip] = open_dataset(base, operator=operator).num_variants
    assert counts == {(True, False): 1, (True, True): 2, (False, False): 4, (False, True): 8}

    operator = default(height=16, width=16, center_crop=False, random_flip=True)
    one, other = open_dataset(base, operator=operator, seed=1), open_dataset(base, operator=operator, seed=1)
    images = [image_bytes(one.load(0, variant)["image"]) for variant in range(8)]
    assert len(set(images)) == 8
    assert images == [image_bytes(other.load(0, variant)["image"]) for variant in range(8)]
    reseeded = open_dataset(base, operator=operator, seed=2)
    assert images != [image_bytes(reseeded.load(0, variant)["image"]) for variant in range(8)]
    # the same picture in another row is cropped elsewhere
    assert images != [image_bytes(one.load(1, variant)["image"]) for variant in range(8)]
    # variants come in mirrored pairs
    mirrored = [image_bytes(one.load(0, v)["image"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)) for v in range(8)]
    assert set(mirrored) == set(images)
    with pytest.raises(ValueError, match=r"variant must be in \[0, 8\), got 8"):
        one.load(0, 8)


def test_variant_is_drawn_for_each_item_and_epoch(write_dataset: Write) -> None:
    base = write_dataset("image,prompt\na.png,x\n", "a.png")
    dataset = open_dataset(base, operator=default(height=32, width=32, random_flip=True), repeat=2000)
    drawn = [dataset.variant(item, 0) for item in range(2000)]
    assert drawn == [dataset.variant(item, 0) for item in range(2000)]
    assert 900 < sum(drawn) < 1100
    assert drawn != [dataset.variant(item, 1) for item in range(2000)]
    assert image_bytes(dataset[0, 1]["image"]) == image_bytes(dataset.load(7, 1)["image"])
    assert image_bytes(dataset[0, 1]["image"]) != image_bytes(dataset[0]["image"])


def test_columns_are_augmented_alike(write_dataset: Write) -> None:
    base = write_dataset("image,control,prompt\na.png,a.png,x\n", "a.png")
    operator = default(height=16, width=16, center_crop=False, random_flip=True)
    dataset = open_dataset(base, "image,control", operator)
    assert dataset.num_variants == 8
    for variant in range(8):
        sample = dataset.load(0, variant)
        assert image_bytes(sample["image"]) == image_bytes(sample["control"])


@dataclass(frozen=True)
class Darken(RandomOperator):
    """A random operator as a user would write it."""

    purpose: ClassVar[str] = "darken"
    num_variants: ClassVar[int] = 3
    keeps_size: ClassVar[bool] = True

    def apply_random(self, value, variant, generator):
        factor = torch.rand(1, generator=generator).item()
        return value.point(lambda level: int(level * factor))


def test_random_operator_of_a_user(write_dataset: Write) -> None:
    base = write_dataset("image,prompt\na.png,x\n", "a.png")
    dataset = open_dataset(base, operator=default(height=32, width=32) >> Darken() >> RandomFlip())
    assert dataset.num_variants == 6
    assert len({image_bytes(dataset.load(0, variant)["image"]) for variant in range(6)}) == 6
    assert dataset.bucket(0) == (32, 32)
    # by hand it draws from torch's global generator
    image = Image.open(base / "a.png")
    torch.manual_seed(0)
    first = image_bytes(Darken()(image))
    torch.manual_seed(0)
    assert image_bytes(Darken()(image)) == first


# -- fingerprints


def test_fingerprint_follows_content_operator_and_variant(write_dataset: Write) -> None:
    base = write_dataset("image,prompt,n\na.png,x,1\nb.png,y,2\n", "a.png", "b.png")
    operator = default(height=32, width=32, random_flip=True)
    dataset = open_dataset(base, operator=operator)
    first = dataset.fingerprint(0)
    assert {key: first[key] for key in ("prompt", "n")} == {"prompt": "x", "n": "1"}
    # the same picture under another name, in another row, in another folder
    assert dataset.fingerprint(1)["image"] == first["image"]
    shutil.copytree(base, base.parent / "moved")
    assert open_dataset(base.parent / "moved", operator=operator).fingerprint(0) == first
    # other variant, other operator, other content
    assert dataset.fingerprint(0, 1)["image"] != first["image"]
    assert open_dataset(base, operator=default(height=32, width=16, random_flip=True)).fingerprint(0) != first
    Image.new("RGB", (48, 32)).save(base / "a.png")
    assert dataset.fingerprint(0)["image"] != first["image"]


def test_fingerprint_of_random_crop_follows_seed_and_row(write_dataset: Write) -> None:
    base = write_dataset("image,prompt\na.png,x\na.png,y\n", "a.png")
    operator = default(height=16, width=16, center_crop=False)
    one, other = open_dataset(base, operator=operator, seed=1), open_dataset(base, operator=operator, seed=2)
    assert len({one.fingerprint(0)["image"], one.fingerprint(1)["image"], other.fingerprint(0)["image"]}) == 3
    # without randomness the seed does not matter
    assert open_dataset(base, seed=1).fingerprint(0) == open_dataset(base, seed=2).fingerprint(0)


def test_fingerprint_does_not_decode_and_hashes_once(write_dataset: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_dataset("image,prompt\na.png,x\n", "a.png")
    dataset = open_dataset(base, repeat=3)
    monkeypatch.setattr(Image, "open", None)
    first = dataset.fingerprint(0)
    monkeypatch.setattr("hashlib.blake2b", _counting_blake2b := _Counting(__import__("hashlib").blake2b))
    assert dataset.fingerprint(2) == first
    assert _counting_blake2b.file_hashes == 0


class _Counting:
    def __init__(self, blake2b) -> None:
        self.blake2b, self.file_hashes = blake2b, 0

    def __call__(self, *content, **options):
        self.file_hashes += not content
        return self.blake2b(*content, **options)


def double(value: str) -> str:
    return value if value in {"one", "of", "these", "words"} else value * 2


def appending(text: str):
    return lambda value: value + text


def test_fingerprint_is_the_same_in_another_process(write_dataset: Write) -> None:
    base = write_dataset("image,prompt\na.png,x\n", "a.png")
    chosen = default(height=16, width=16, center_crop=False, random_flip=True)
    here = open_dataset(base, operator=chosen, special_operator_map={"prompt": double}).fingerprint(0, 5)
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_data_dataset import *
dataset = open_dataset(Path({str(base)!r}),
    operator=default(height=16, width=16, center_crop=False, random_flip=True),
    special_operator_map={{"prompt": double}})
print(json.dumps(dataset.fingerprint(0, 5)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == here


def test_fingerprint_tells_functions_apart(write_dataset: Write) -> None:
    base = write_dataset("image,prompt\na.png,x\n", "a.png")
    lambdas = (lambda v: v + "a", lambda v: v + "b", lambda v: (lambda: v + "c")())
    functions = (double, keep, appending("1"), appending("2"), *lambdas)
    prints = {
        json.dumps(open_dataset(base, special_operator_map={"prompt": function}).fingerprint(0))
        for function in functions
    }
    assert len(prints) == 7


@dataclass(frozen=True)
class Append:
    """A callable object of a user."""

    text: str

    def __call__(self, value: str) -> str:
        return value + self.text


def test_fingerprint_follows_the_state_of_callable_objects(write_dataset: Write) -> None:
    base = write_dataset("image,prompt\na.png,x\n", "a.png")

    def fingerprint(function) -> str:
        return open_dataset(base, special_operator_map={"prompt": function}).fingerprint(0)["prompt"]

    assert fingerprint(Append("a")) == fingerprint(Append("a"))
    assert fingerprint(Append("a")) != fingerprint(Append("b"))
    with pytest.raises(UserError, match=r"row 1, column 'prompt': .*cannot be pickled"):
        fingerprint(Append(lambda: None))


# -- buckets


def test_bucket_is_the_size_that_comes_out(tmp_path: Path) -> None:
    base = tmp_path / "data"
    base.mkdir()
    sizes = [(100, 60), (60, 100), (300, 200), (64, 64)]
    exif = Image.Exif()
    exif[0x0112] = 6
    for n, size in enumerate(sizes):
        Image.new("RGB", size).save(base / f"{n}.jpg", exif=exif)
        (base / f"{n}.txt").write_text("x", encoding="utf-8")
    for options in (
        {},
        {"max_pixels": 10_000},
        {"height": 48, "width": 32},
        {"max_pixels": 10_000, "random_flip": True},
    ):
        dataset = open_dataset(base, operator=default(**options), repeat=2)
        for item in range(8):
            width, height = dataset[item]["image"].size
            assert dataset.bucket(item) == (height, width)
        assert dataset.buckets() == [dataset.bucket(item) for item in range(8)]
    assert open_dataset(base, operator=default()).bucket(0) == (96, 48)


def test_bucket_reads_a_header_once(write_dataset: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_dataset("image,prompt\na.png,x\n", "a.png")
    dataset = open_dataset(base, operator=default(), repeat=3)
    assert dataset.bucket(0) == (32, 48)
    (base / "a.png").unlink()
    assert dataset.bucket(2) == (32, 48)
    # a fixed size needs no file at all
    assert open_dataset(base).buckets() == [(32, 32)]


def test_bucket_is_unknown_after_an_operator_that_may_change_the_size(write_dataset: Write) -> None:
    base = write_dataset("image,prompt\na.png,x\n", "a.png")
    assert open_dataset(base, operator=default(height=32, width=32) >> brightness).bucket(0) is None
    assert open_dataset(base, operator=len).bucket(0) is None
    assert UnifiedDataset(base).bucket(0) is None
    assert open_dataset(base, operator=default() >> brightness >> ImageCropAndResize(16, 16)).buckets() == [(16, 16)]


# -- workers


def test_spawned_workers_load_the_same_samples(write_dataset: Write) -> None:
    base = write_dataset("image,prompt\na.png,x\nb.png,y\nc.png,z\n", "a.png", "b.png", "c.png")
    dataset = open_dataset(base, operator=default(height=16, width=16, center_crop=False, random_flip=True))
    dataset.fingerprint(0)
    keyed = [[(item, dataset.variant(item, 4)) for item in batch] for batch in ([2, 0], [1])]
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=keyed, num_workers=1, multiprocessing_context="spawn", collate_fn=keep
    )
    loaded = [sample for batch in loader for sample in batch]
    expected = [dataset.load(*key) for batch in keyed for key in batch]
    assert [s["prompt"] for s in loaded] == [s["prompt"] for s in expected]
    assert [image_bytes(s["image"]) for s in loaded] == [image_bytes(s["image"]) for s in expected]


def test_pickled_data_set_is_about_as_large_as_its_metadata(tmp_path: Path) -> None:
    text = "image,prompt\n" + "".join(f"{i}.png,caption number {i}\n" for i in range(10_000))
    (tmp_path / "metadata.csv").write_text(text, encoding="utf-8")
    dataset = open_dataset(tmp_path, operator=default())
    assert len(pickle.dumps(dataset)) < len(text) + 16 * 10_000 + 10_000
    assert pickle.loads(pickle.dumps(dataset)).row(9_999)["prompt"] == "caption number 9999"
