"""Stop anywhere, resume as if the run had not stopped. The processes are real and really killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffsynth.core.errors import UserError
from diffsynth.diffusion.checkpoint import find_state, verify_state
from tests.pictures import make_dataset
from tests.training_run import train_tiny

OPTIONS = dict(num_epochs=3, save_steps=2, caption_dropout=0.3, lr_scheduler="cosine", gradient_accumulation_steps=2)
SCRIPT = """
import json, sys
from pathlib import Path
from tests.training_run import train_tiny
flux, data, out, options = sys.argv[1:]
train_tiny(Path(flux), Path(data), Path(out), **json.loads(options))
"""


def start(flux_folder: Path, data: Path, out: Path, **options) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(flux_folder), str(data), str(out), json.dumps({**OPTIONS, **options})],
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def final_files(folder: Path) -> dict[str, bytes]:
    state = "state/step-9"
    names = ["step-9.safetensors", "metrics.jsonl", f"{state}/weights.safetensors", f"{state}/optimizer.safetensors"]
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("seed", [1, 2])
def test_run_killed_three_times_equals_the_run_that_was_not(flux_folder, tmp_path, seed):
    data = make_dataset(tmp_path / "pictures", count=6)
    train_tiny(flux_folder, data, tmp_path / "whole", **OPTIONS)
    chance, out = random.Random(seed), tmp_path / "killed"
    for _ in range(3):
        process = start(flux_folder, data, out, resume="auto")
        wanted = len(_metrics(out)) + 1
        while len(_metrics(out)) < wanted and process.poll() is None:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = start(flux_folder, data, out, resume="auto")
    assert last.wait(120) == 0, last.stderr.read().decode()
    assert final_files(out) == final_files(tmp_path / "whole")


def _metrics(folder: Path) -> list[str]:
    path = folder / "metrics.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def test_damaged_state_is_passed_over_for_an_older_complete_one(flux_folder, tmp_path):
    data = make_dataset(tmp_path / "pictures", count=2)
    train_tiny(flux_folder, data, tmp_path / "run", save_steps=1)
    newest = find_state(tmp_path / "run", "auto")
    assert newest.name == "step-2"
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert not verify_state(newest)
    for resume in ("auto", str(newest)):
        with pytest.raises(UserError, match="damaged"):
            find_state(tmp_path / "run", resume)
    copy = newest.with_name("step-1")
    train_tiny(flux_folder, data, tmp_path / "other", save_steps=1, max_steps=1)
    (tmp_path / "other" / "state" / "step-1").rename(copy)
    assert find_state(tmp_path / "run", "auto") == copy


def test_resume_refuses_another_data_set(flux_folder, tmp_path):
    data = make_dataset(tmp_path / "pictures", count=3)
    train_tiny(flux_folder, data, tmp_path / "run", save_steps=1, max_steps=2)
    lines = (data / "metadata.csv").read_text(encoding="utf-8").splitlines()
    (data / "metadata.csv").write_text("\n".join(lines[:2]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="items of the data set: 3 -> 1"):
        train_tiny(flux_folder, data, tmp_path / "run", save_steps=1, max_steps=3, resume="auto")


def test_resume_refuses_options_that_would_make_it_another_run(flux_folder, tmp_path):
    data = make_dataset(tmp_path / "pictures", count=2)
    train_tiny(flux_folder, data, tmp_path / "run", save_steps=1, max_steps=1)
    with pytest.raises(UserError, match=r"learning_rate: 0.001 -> 0.5"):
        train_tiny(flux_folder, data, tmp_path / "run", save_steps=1, resume="auto", learning_rate=0.5)


def test_full_disk_while_saving_leaves_the_previous_checkpoint(flux_folder, tmp_path, monkeypatch):
    import errno

    import diffsynth.diffusion.checkpoint as home

    data = make_dataset(tmp_path / "pictures", count=3)
    real = os.fsync
    state = {"full": False}

    def full(descriptor):
        if state["full"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor)

    saves = []
    real_save = home.save_state

    def second_save_fails(folder, training_state):
        saves.append(1)
        state["full"] = len(saves) == 2
        return real_save(folder, training_state)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr("diffsynth.diffusion.task.save_state", second_save_fails)
    with pytest.raises(UserError, match=r"[Nn]o space|full"):
        train_tiny(flux_folder, data, tmp_path / "run", save_steps=1)
    state["full"] = False
    assert find_state(tmp_path / "run", "auto").name == "step-1"
    assert (tmp_path / "run" / "step-1.safetensors").exists()
