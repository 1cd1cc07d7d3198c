"""Saving: equal content gives equal bytes, and a failure leaves the old file."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffsynth.core.errors import UserError
from diffsynth.core.loader import WeightReader, save_safetensors

TENSORS = {
    "b": torch.arange(3, dtype=torch.int64),
    "a.bias": torch.randn(3, 5, dtype=torch.bfloat16),
    "half": torch.randn(7, dtype=torch.float16),
    "fp8": torch.randn(3).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(2.5),
    "none": torch.zeros(0, 4),
    "strided": torch.randn(4, 6).T,
}


def test_the_library_reads_what_was_written(tmp_path: Path):
    path = save_safetensors(tmp_path / "sub" / "x.safetensors", TENSORS, {"rank": "4", "alpha": "8"})
    loaded = load_file(path)
    assert set(loaded) == set(TENSORS)
    for key, value in TENSORS.items():
        assert loaded[key].dtype == value.dtype
        assert torch.equal(loaded[key].float(), value.float())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "rank": "4", "alpha": "8"}
    with WeightReader(path) as reader:
        assert reader.metadata["rank"] == "4"
    assert [entry.name for entry in path.parent.iterdir()] == ["x.safetensors"]


def test_equal_content_gives_equal_bytes(tmp_path: Path):
    metadata = {str(number): "x" for number in range(20)}
    first = save_safetensors(tmp_path / "1", TENSORS, metadata)
    second = save_safetensors(tmp_path / "2", dict(reversed(TENSORS.items())), dict(reversed(metadata.items())))
    assert first.read_bytes() == second.read_bytes()


def test_full_disk_keeps_the_old_file_and_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(3)})
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left") as error:
        save_safetensors(path, {"a": torch.ones(3)})
    assert str(path) in str(error.value)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_write_that_fails_half_way_leaves_no_part(tmp_path: Path):
    resource = pytest.importorskip("resource")
    path = save_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(3)})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot save"):
            save_safetensors(path, {"a": torch.ones(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="cannot save"):
        save_safetensors(tmp_path / "file" / "x.safetensors", {"a": torch.ones(3)})
