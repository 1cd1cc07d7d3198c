"""Opening weight files: what is read, what is refused, and that nothing runs."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from weight_files import CLIP_L, FLUX_DIT, write_raw, write_weights

from diffsynth.core.errors import UserError
from diffsynth.core.loader import WeightReader

ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def test_reads_what_the_library_reads():
    with WeightReader(FLUX_DIT) as reader:
        for key, value in load_file(FLUX_DIT).items():
            assert torch.equal(reader.get(key), value)
            assert reader.tensors[key] == (tuple(value.shape), value.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64,
                                   torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_every_dtype_survives(tmp_path: Path, dtype: torch.dtype):
    value = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    path = write_weights(tmp_path / "x.safetensors", {"matrix": value, "scalar": value[0, 1], "none": value[:0]})
    with WeightReader(path) as reader:
        assert torch.equal(reader.get("matrix").float(), value.float())
        assert reader.get("scalar").shape == ()
        assert reader.get("none").shape == (0, 3)
        assert reader.get("matrix").dtype == dtype


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (ONE, b"1234", "truncated"),
        (ONE, b"123456789", "after its last tensor"),
        ({"a": ONE["a"], "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, b"x" * 12, "overlapping"),
        ({"a": ONE["a"], "b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}, b"x" * 16, "unexplained"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"x" * 8, "header lies"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"x" * 8, "not allow"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, b"x" * 8, "header lies"),
        ({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, b"x" * 8, "F99"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, b"x" * 8, "not allow"),
        ({"a": 3}, b"x" * 8, "not allow"),
        (b'{"a": 1, "a": 2}', b"", "occurs twice"),
        (b'{"a": ', b"", "unreadable"),
        (b'{"__metadata__": {"x": 1}}', b"", "not text"),
        (b'{"a":' + b"[" * 90000, b"", "unreadable"),
    ],
)
def test_lying_headers_are_refused(tmp_path: Path, header: object, data: bytes, says: str):
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(UserError, match=says) as error:
        WeightReader(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_header_longer_than_the_file_is_refused(tmp_path: Path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes((10**12).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="header claims"):
        WeightReader(path)


@pytest.mark.parametrize("keep", [0.9, 0.1, 0.001])
def test_truncated_file_is_named(tmp_path: Path, keep: float):
    path = tmp_path / "half.safetensors"
    content = FLUX_DIT.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match="truncated") as error:
        WeightReader(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
        (b"GGUF\x03\x00\x00\x00\x00", "GGUF"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"hello, I am not a model", "no weight file"),
        (b"PK\x03\x04 and then nothing", "no readable PyTorch"),
        (b"\x80\x02 and then nothing", "or is damaged"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, says: str):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        WeightReader(path)
    assert str(path) in str(error.value)


def test_missing_file_and_folder_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        WeightReader(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="folder"):
        WeightReader(tmp_path)


class _Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_runs_nothing(tmp_path: Path, suffix: str, zipped: bool):
    marker, path = tmp_path / "marker", tmp_path / f"model{suffix}"
    content = {"weight": torch.zeros(2), "attack": _Malicious(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="could run code") as error:
        WeightReader(path)
    assert str(path) in str(error.value)
    assert not marker.exists()
    with path.open("rb") as file:
        torch.load(file, weights_only=False)
    assert marker.exists(), "the attack itself must work, or this test shows nothing"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_plain_malicious_pickle_runs_nothing(tmp_path: Path):
    marker, path = tmp_path / "marker", tmp_path / "model.bin"
    path.write_bytes(pickle.dumps(_Malicious(marker)))
    with pytest.raises(UserError, match="could run code"):
        WeightReader(path)
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3},
                                  lambda state: {"module": state}])
def test_pickled_state_dicts_are_unwrapped(tmp_path: Path, zipped: bool, wrap):
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)}
    path = tmp_path / "model.ckpt"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=zipped)
    with WeightReader(path) as reader:
        assert set(reader.tensors) == set(state)
        assert torch.equal(reader.get("a.weight"), state["a.weight"])


def test_pickle_without_tensors_is_refused(tmp_path: Path):
    path = tmp_path / "model.pt"
    torch.save({"epoch": 3}, path)
    with pytest.raises(UserError, match="dictionary of tensors"):
        WeightReader(path)


def test_truncated_pickle_is_named(tmp_path: Path):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.zeros(10_000)}, path)
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(UserError, match="truncated"):
        WeightReader(path)


def test_shards_look_like_one_file(tmp_path: Path):
    first = write_weights(tmp_path / "1.safetensors", {"a": torch.zeros(1)})
    second = write_weights(tmp_path / "2.safetensors", {"b": torch.ones(2)})
    with WeightReader([first, second]) as reader:
        assert list(reader.tensors) == ["a", "b"]
        assert torch.equal(reader.get("b"), torch.ones(2))
    with pytest.raises(UserError, match="both in"):
        WeightReader([first, write_weights(tmp_path / "3.safetensors", {"a": torch.ones(2)})])


def test_unknown_key_lists_the_first_ones():
    with WeightReader(CLIP_L) as reader, pytest.raises(UserError, match="53 tensors, for example 'text_model"):
        reader.get("nothing")


def test_fingerprint_follows_the_content_and_not_the_name(tmp_path: Path):
    first = write_weights(tmp_path / "1.safetensors", {"a": torch.zeros(5000)})
    same = write_weights(tmp_path / "other" / "x.safetensors", {"a": torch.zeros(5000)})
    changed = write_weights(tmp_path / "2.safetensors", {"a": torch.zeros(5000).index_fill(0, torch.tensor(4321), 1)})
    prints = [WeightReader(path).fingerprint() for path in (first, same, changed)]
    assert prints[0] == prints[1] != prints[2]
