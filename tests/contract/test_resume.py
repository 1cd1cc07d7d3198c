"""Stop anywhere, resume as if you had not. The processes are real, and really killed."""

from __future__ import annotations

import functools
import json
import random
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffsynth.core.errors import StoppedEarly, UserError
from diffsynth.diffusion.checkpoint import find_state, verify_state
from tests.pictures import make_dataset

from .forked import Forked
from .tiny import FamilyAtWork, metrics

OPTIONS: dict[str, Any] = dict(
    num_epochs=3, save_steps=2, caption_dropout=0.3, lr_scheduler="cosine", gradient_accumulation_steps=2,
    ema_decay=0.9, keep_checkpoints=2)
LAST = 9
"""Steps of that run: six pictures, two to a step, three times."""


class Runs:
    """Runs of one family with the same options: the one that was never stopped, and others to be compared with it."""

    def __init__(self, family: FamilyAtWork, data: Path, folder: Path) -> None:
        self.family, self.data, self.folder = family, data, folder
        self.cache = str(folder / "cache")
        self.whole = folder / "whole"
        self.train(self.whole)
        self.expected = final_files(self.whole)
        self.processes: list[Forked] = []

    def train(self, output: Path, **options: Any) -> Any:
        return self.family.train(self.data, output, **{**OPTIONS, "cache_path": self.cache, **options})

    def start(self, output: Path, **options: Any) -> Forked:
        output.parent.mkdir(parents=True, exist_ok=True)
        self.processes.append(Forked(functools.partial(self.train, output, resume="auto", **options)))
        return self.processes[-1]

    def finish(self, output: Path, **options: Any) -> None:
        """Resume to the end, and compare with the straight run."""
        process = self.start(output, **options)
        assert process.wait() == 0, process.said()
        found = final_files(output)
        assert set(found) == set(self.expected)
        assert [name for name in found if found[name] != self.expected[name]] == []
        assert not list(output.rglob("*.tmp"))
        assert not list(output.rglob("*.partial"))


def final_files(folder: Path) -> dict[str, bytes]:
    """Everything of a finished run that says what was learned, and which states and weights are left."""
    names = ["metrics.jsonl", *(f"state/step-{LAST}/{name}.safetensors" for name in ("weights", "optimizer", "ema"))]
    files = {name: (folder / name).read_bytes() for name in names}
    files |= {path.name: path.read_bytes() for path in folder.glob("step-*.safetensors")}
    state = json.loads((folder / "state" / f"step-{LAST}" / "state.json").read_text(encoding="utf-8"))
    # where the run was started from may differ; what it is may not
    kept = {name: state[name] for name in ("progress", "optimizer", "lr_scheduler", "ema_updates", "monitors")}
    states = sorted(path.name for path in (folder / "state").iterdir())
    return {**files, "state": json.dumps(kept).encode(), "states": str(states).encode()}


@pytest.fixture(scope="session")
def runs_of_family(family, pictures, tmp_path_factory) -> Runs:
    return Runs(family, pictures, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def runs(runs_of_family) -> Iterator[Runs]:
    yield runs_of_family
    for process in runs_of_family.processes:
        process.send(signal.SIGKILL)
    runs_of_family.processes.clear()


def newest_step(output: Path) -> int:
    steps = [int(path.name.removeprefix("step-")) for path in (output / "state").glob("step-*")]
    return max(steps, default=0)


def is_saving(output: Path) -> bool:
    return any((output / "state").glob(".step-*")) or any(output.glob(".step-*.tmp"))


@pytest.mark.parametrize("seed", [1, 2])
def test_run_killed_again_and_again_equals_the_run_that_was_not(runs, tmp_path, seed):
    chance, output = random.Random(seed), tmp_path / "run"
    for _ in range(3):
        process, wanted, wait_s = runs.start(output), len(metrics(output)) + 1, chance.uniform(0, 0.3)
        process.send_when(signal.SIGKILL, lambda: len(metrics(output)) >= wanted)  # noqa: B023
        time.sleep(wait_s)
        process.send(signal.SIGKILL)
        process.wait()
    runs.finish(output)


def test_run_killed_inside_its_saves_and_twice_in_a_row_equals_the_run_that_was_not(runs, tmp_path):
    output = tmp_path / "run"
    for wait_s in (0.0, 0.002, 0.004):
        process, before = runs.start(output), newest_step(output)
        killed = process.send_when(
            signal.SIGKILL, lambda: is_saving(output) and (newest_step(output) > before or wait_s == 0))  # noqa: B023
        assert killed
        process.wait()
        again = runs.start(output)
        time.sleep(wait_s * 50)
        again.send(signal.SIGKILL)
        again.wait()
    runs.finish(output)


def test_sigterm_saves_ends_with_code_4_and_resumes(runs, tmp_path):
    output = tmp_path / "run"
    process = runs.start(output)
    assert process.send_when(signal.SIGTERM, lambda: len(list(output.glob("step-2*"))))
    assert process.wait() == 4, process.said()
    step = newest_step(output)
    assert 2 <= step < LAST
    assert f"stopped on request (SIGTERM) after step {step} of {LAST}" in process.said()
    assert verify_state(output / "state" / f"step-{step}")
    assert (output / f"step-{step}.safetensors").exists()
    assert [row["step"] for row in metrics(output)] == list(range(1, step + 1))
    runs.finish(output, keep_checkpoints=2)


def test_ctrl_c_on_the_command_line_saves_and_ends_with_code_4(runs, tmp_path):
    output = tmp_path / "run"
    process = runs.family.start(runs.data, output, **{**OPTIONS, "cache_path": runs.cache, "max_steps": 100_000,
                                                      "num_epochs": 40_000})
    end = time.monotonic() + 120
    while not newest_step(output) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 4, said
    assert said.strip().splitlines()[-1].startswith("stopped on request (Ctrl-C) after step")
    assert find_state(output, "auto").name == f"step-{len(metrics(output))}"


def test_a_second_ctrl_c_leaves_at_once(runs, tmp_path):
    output = tmp_path / "run"
    options = dict(num_epochs=40_000, gradient_accumulation_steps=1000, dataset_repeat=1000)
    process = runs.start(output, **options)  # a step takes a minute
    assert process.send_when(signal.SIGINT, (output / "metrics.jsonl").exists)
    assert process.send_when(signal.SIGINT, lambda: "second Ctrl-C leaves at once" in process.said())
    started = time.monotonic()
    assert process.wait() == 130, process.said()
    assert time.monotonic() - started < 10
    assert newest_step(output) == 0


def test_max_minutes_saves_at_the_next_step(runs, tmp_path):
    output = tmp_path / "run"
    for step in (1, 2):
        with pytest.raises(StoppedEarly, match=rf"max_minutes 1e-06\) after step {step} of {LAST}"):
            runs.train(output, max_minutes=1e-6, resume="auto")
        assert find_state(output, "auto").name == f"step-{step}"
    runs.finish(output)


def test_requests_end_the_filling_of_the_cache_and_keep_what_is_made(runs, tmp_path):
    with pytest.raises(StoppedEarly, match="while the cache was being filled"):
        runs.train(tmp_path / "run", max_minutes=1e-6, cache_path=str(tmp_path / "cache"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("in_background", [True, False])
def test_full_disk_leaves_the_previous_state_and_resumes(runs, tmp_path, in_background):
    output = tmp_path / "run"
    process = runs.start(output, save_in_background=in_background)
    while not newest_step(output):
        assert process.poll() is None, process.said()
        time.sleep(0.001)
    # a real limit of the system: writing more than this into any file fails
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    assert process.wait() == 2, process.said()
    assert process.said().strip().splitlines()[-1].startswith("error: cannot save")
    states = [path.name for path in (output / "state").iterdir()]
    assert len(states) == 1
    assert verify_state(output / "state" / states[0])
    assert not list(output.rglob(".*"))
    runs.finish(output)


def test_a_disk_that_is_full_from_the_first_file_on_is_told_in_a_sentence(runs, tmp_path):
    output = tmp_path / "run"
    process = runs.start(output)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
    assert process.wait() == 2, process.said()
    assert process.said().strip().splitlines()[-1].startswith("error: cannot ")
    assert [path.name for path in output.rglob("*")] == []
    runs.finish(output)


def test_a_disk_that_is_too_full_is_refused_before_anything_is_done(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(UserError, match=r"0\.1 MB are free there, and the first 2 saves need about 0\.[3-9] MB"):
        runs.train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_background_and_plain_saving_write_the_same(runs, tmp_path):
    runs.train(tmp_path / "run", save_in_background=False)
    assert final_files(tmp_path / "run") == runs.expected


def test_damaged_state_is_passed_over_for_an_older_complete_one(runs, tmp_path):
    for name, steps in (("run", 2), ("other", 1)):
        runs.train(tmp_path / name, save_steps=1, max_steps=steps, lr_scheduler="constant")
    newest = find_state(tmp_path / "run", "auto")
    assert newest.name == "step-2"
    weights = newest / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert not verify_state(newest)
    for resume in ("auto", str(newest)):
        with pytest.raises(UserError, match="damaged"):
            find_state(tmp_path / "run", resume)
    copy = newest.with_name("step-1")
    (tmp_path / "other" / "state" / "step-1").rename(copy)
    assert find_state(tmp_path / "run", "auto") == copy


@pytest.mark.parametrize(("changes", "message"), [
    (dict(learning_rate=0.5), r"learning_rate: 0\.001 -> 0\.5"),
    (dict(ema_decay=0.8), r"ema_decay: 0\.9 -> 0\.8"),
    (dict(num_epochs=2), r"steps of the learning-rate schedule: 9 -> 6"),
    (dict(gradient_accumulation_steps=3), r"items per step: 2 -> 3"),
    (dict(seed=4), r"seed: 3 -> 4"),
])
def test_resume_refuses_options_that_would_make_it_another_run(runs, changes, message):
    before = {path: path.stat().st_mtime_ns for path in runs.whole.rglob("*")}
    with pytest.raises(UserError, match=message):
        runs.train(runs.whole, resume="auto", **changes)
    assert before == {path: path.stat().st_mtime_ns for path in runs.whole.rglob("*")}


def test_resume_refuses_another_data_set(family, tmp_path):
    data = make_dataset(tmp_path / "pictures", count=3)
    family.train(data, tmp_path / "run", save_steps=1, max_steps=2)
    lines = (data / "metadata.csv").read_text(encoding="utf-8").splitlines()
    (data / "metadata.csv").write_text("\n".join(lines[:2]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="items of the data set: 3 -> 1"):
        family.train(data, tmp_path / "run", save_steps=1, max_steps=3, resume="auto")


def test_going_on_from_an_older_state_sets_newer_ones_aside(runs, tmp_path):
    with pytest.raises(StoppedEarly):
        runs.train(tmp_path / "older", max_minutes=1e-6)
    older = tmp_path / "run" / "state" / "step-1"
    runs.train(tmp_path / "run")
    (tmp_path / "older" / "state" / "step-1").rename(older)
    with pytest.raises(StoppedEarly):
        runs.train(tmp_path / "run", resume=str(older), max_minutes=1e-6)
    assert find_state(tmp_path / "run", "auto").name == "step-2"
    assert len(metrics(tmp_path / "run")) == 2
