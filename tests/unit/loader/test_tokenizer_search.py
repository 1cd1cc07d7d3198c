"""Where tokenizers are looked for, in order, and what is said when they are nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffsynth.core.errors import UserError
from diffsynth.core.loader import ModelConfig
from diffsynth.models.registry import get_family
from diffsynth.models.tokenizers import find_tokenizer, load_tokenizer

FLUX = get_family("flux")
CLASS = "transformers.CLIPTokenizer"


def make_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True)
    words = ["!", "a", "a</w>", "d", "o", "g</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    return folder


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "True")
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))


@pytest.mark.parametrize("weights", ["x.safetensors", "text_encoder/x.safetensors", "a/b/x.safetensors"])
def test_beside_the_weights_or_two_folders_above(tmp_path: Path, weights: str):
    folder = make_tokenizer(tmp_path / "flux" / "tokenizer")
    assert find_tokenizer("tokenizer", None, [tmp_path / "flux" / weights], FLUX) == folder
    with pytest.raises(UserError):
        find_tokenizer("tokenizer", None, [tmp_path / "flux" / "a" / "b" / "c" / "x.safetensors"], FLUX)


def test_order_is_explicit_then_beside_then_models_folder(tmp_path: Path):
    explicit = make_tokenizer(tmp_path / "mine")
    beside = make_tokenizer(tmp_path / "weights" / "tokenizer")
    base = make_tokenizer(tmp_path / "models" / FLUX.model_ids[0] / "tokenizer")
    near = [tmp_path / "weights" / "x.safetensors"]
    assert find_tokenizer("tokenizer", ModelConfig(explicit), near, FLUX) == explicit
    assert find_tokenizer("tokenizer", None, near, FLUX) == beside
    assert find_tokenizer("tokenizer", None, [], FLUX) == base


def test_preset_folder_is_searched(tmp_path: Path):
    folder = make_tokenizer(tmp_path / "models" / "FLUX" / "FLUX.1-dev" / "tokenizer")
    assert find_tokenizer("tokenizer", None, [], FLUX) == folder


def test_missing_offline_says_what_to_fetch_and_where(tmp_path: Path):
    with pytest.raises(UserError, match="'tokenizer_2' of flux") as error:
        find_tokenizer("tokenizer_2", None, [], FLUX)
    message = str(error.value)
    assert str(tmp_path / "models" / FLUX.model_ids[0] / "tokenizer_2") in message
    assert FLUX.model_ids[0] in message
    assert "\n" not in message


def test_explicit_folder_without_a_tokenizer_is_named(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no tokenizer"):
        find_tokenizer("tokenizer", ModelConfig(tmp_path / "empty"), [], FLUX)


def test_tokenizer_is_loaded_from_its_files(tmp_path: Path):
    tokenizer = load_tokenizer(CLASS, "tokenizer", ModelConfig(make_tokenizer(tmp_path / "t")), [], FLUX)
    assert tokenizer("a dog").input_ids == [6, 2, 3, 4, 5, 7]


def test_broken_tokenizer_is_named(tmp_path: Path):
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(UserError, match="cannot be read as CLIPTokenizer") as error:
        load_tokenizer(CLASS, "tokenizer", ModelConfig(folder), [], FLUX)
    assert str(folder) in str(error.value)
