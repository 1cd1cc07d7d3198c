"""Pictures that say how they were made: the text in the file, and what is refused when it is read."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffsynth.config import GenerateConfig
from diffsynth.core.errors import UserError
from diffsynth.core.picture_file import MAX_TEXT, read_picture_text, save_picture
from diffsynth.diffusion.picture_recipe import read_recipe
from diffsynth.trainers.generate import generate

RECIPE = {
    "version": 1, "diffsynth": "1.0", "family": "some", "device": "cpu", "torch_dtype": "float32", "index": 0,
    "picture": {"prompt": "a dog", "seed": 1, "height": 8, "width": 16}, "input_image_sha256": None,
    "models": [{"component": "net", "paths": ["/there/net.safetensors"], "fingerprint": "0" * 32}],
    "fp8_models": [], "tokenizer_path": None,
    "loras": [{"path": "/there/lora.safetensors", "strength": 1.0, "sha256": "0" * 64}],
}


def picture() -> Image.Image:
    return Image.new("RGB", (16, 8), (10, 200, 30))


def with_recipe(path: Path, **changes: object) -> Path:
    save_picture(picture(), path, json.dumps({**RECIPE, **changes}))
    return path


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_picture_keeps_its_text(tmp_path, ending):
    path = tmp_path / f"picture.{ending}"
    assert save_picture(picture(), path, json.dumps(RECIPE))
    assert json.loads(read_picture_text(path)) == RECIPE
    assert read_recipe(path).options.seed == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_other_formats_hold_no_text_and_say_so(tmp_path):
    path = tmp_path / "picture.bmp"
    assert not save_picture(picture(), path, "text")
    assert read_picture_text(path) is None
    with pytest.raises(UserError, match="does not say how it was made"):
        read_recipe(path)


def test_equal_pictures_are_equal_files(tmp_path):
    first, second = with_recipe(tmp_path / "a.png"), with_recipe(tmp_path / "b.png")
    assert first.read_bytes() == second.read_bytes()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def insert(path: Path, text: bytes) -> Path:
    """Put a chunk of one's own behind the header of a picture without a text."""
    save_picture(picture(), path)
    content = path.read_bytes()
    path.write_bytes(content[:33] + text + content[33:])
    return path


def test_a_text_that_is_too_long_is_not_read(tmp_path):
    path = insert(tmp_path / "a.png", chunk(b"tEXt", b"diffsynth\0" + b"x" * (MAX_TEXT + 1)))
    with pytest.raises(UserError, match=r"1,048,577 bytes and was not read"):
        read_picture_text(path)


def test_a_damaged_text_is_refused(tmp_path):
    whole = chunk(b"tEXt", b"diffsynth\0{}")
    for damaged in (whole[:-1] + b"\0", whole.replace(b"{}", b"[]"), chunk(b"tEXt", b"diffsynth\0\xff\xfe")):
        with pytest.raises(UserError, match="damaged"):
            read_picture_text(insert(tmp_path / "a.png", damaged))


def test_compressed_texts_and_those_of_others_are_passed_over(tmp_path):
    info = PngInfo()
    info.add_text("diffsynth", "x" * 10_000, zip=True)
    info.add_text("parameters", "a dog, Steps: 20")
    picture().save(tmp_path / "a.png", pnginfo=info)
    assert read_picture_text(tmp_path / "a.png") is None


@pytest.mark.parametrize("text", [
    "", "null", "[]", "{}", "[" * 100_000, '{"version": 1e999}', "not json", '{"version": 1, "version": 2}',
])
def test_what_is_no_recipe_is_refused_in_one_sentence(tmp_path, text):
    path = insert(tmp_path / "a.png", chunk(b"tEXt", b"diffsynth\0" + text.encode()))
    with pytest.raises(UserError) as raised:
        read_recipe(path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("changes", [
    {"version": 2}, {"more": 1}, {"torch_dtype": "float8"}, {"index": -1}, {"index": "0"}, {"models": []},
    {"models": [{**RECIPE["models"][0], "paths": ["https://github.com/some/net.safetensors"]}]},
    {"models": [{**RECIPE["models"][0], "paths": ["net.safetensors"]}]},
    {"models": [{**RECIPE["models"][0], "paths": ["//elsewhere/share/net.safetensors"]}]},
    {"models": [{**RECIPE["models"][0], "paths": ["/there/net\0.safetensors"]}]},
    {"models": [{**RECIPE["models"][0], "model_id": "some/repository"}]},
    {"loras": [{"path": "lora.safetensors", "strength": 1.0, "sha256": "0" * 64}]},
    {"loras": [{**RECIPE["loras"][0], "sha256": "no hash"}]},
    {"picture": {"prompt": "a dog"}}, {"picture": {**RECIPE["picture"], "output": "/there/file"}},
    {"picture": {**RECIPE["picture"], "height": -8}}, {"picture": {**RECIPE["picture"], "num_images": 10**9}},
    {"picture": {**RECIPE["picture"], "prompt": ["a"]}}, {"picture": {**RECIPE["picture"], "input_image": "../../x"}},
])
def test_a_recipe_has_one_form_and_names_only_files_of_this_machine(tmp_path, changes):
    with pytest.raises(UserError, match="not as this program writes it"):
        read_recipe(with_recipe(tmp_path / "a.png", **changes))


def test_strengths_are_finite(tmp_path):
    path = tmp_path / "a.png"
    save_picture(picture(), path, json.dumps(RECIPE).replace('"strength": 1.0', '"strength": NaN'))
    with pytest.raises(UserError, match="not as this program writes it"):
        read_recipe(path)


@pytest.mark.parametrize(("changes", "message"), [
    ({"picture": {**RECIPE["picture"], "width": 1024}}, "another size"),
    ({}, "/there/lora.safetensors, which is not there any more"),
    ({"loras": []}, "/there/net.safetensors, which is not there any more"),
    ({"loras": [], "index": 3}, "picture 3 of 1 cannot be made"),
])
def test_making_a_picture_again_looks_before_it_loads(tmp_path, changes, message):
    source = with_recipe(tmp_path / "a.png", **changes)
    config = {"model_paths": ("/there/other.safetensors",)} if "index" in changes else {}
    with pytest.raises(UserError, match=message):
        generate(GenerateConfig(from_picture=str(source), output=str(tmp_path / "b.png"), **config))
    assert not (tmp_path / "b.png").exists()


def test_a_file_that_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    for path in (tmp_path / "a.png", tmp_path / "gone.png"):
        with pytest.raises(UserError, match=path.name):
            read_recipe(path)
