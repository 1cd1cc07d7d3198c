"""Training states on the disk: whole or absent, whatever happens while one is written."""

from __future__ import annotations

import json
import os
import signal
import threading

import pytest
import torch

from diffsynth.core.errors import UserError
from diffsynth.diffusion.checkpoint import (
    Progress,
    TrainingState,
    find_state,
    load_state,
    refuse_changed_options,
    remove_leftovers,
    save_state,
    verify_state,
)

NUM_SYNCS = 8
"""Times that one save waits for the disk: five files, the folder before the manifest, the folder after the rename."""


def make_state(step: int, value: float = 1.0, ema: bool = True) -> TrainingState:
    weights = {"a": torch.full((3, 2), value), "b": torch.full((2,), value, dtype=torch.bfloat16)}
    optimizer = {
        "state": {0: {"step": torch.tensor(4.0), "exp_avg": torch.full((3, 2), value / 3)}},
        "param_groups": [{"lr": 0.1 + 0.2, "betas": [0.9, 0.999], "params": [0, 1]}],
    }
    return TrainingState(
        Progress(step, 2, 5, [(1, 3)], 2), weights, optimizer, {"last_epoch": step}, {}, {"seed": 3}, {"seed": 3},
        {"a": torch.full((3, 2), value / 7)} if ema else {}, 11, {"numbers": {"bad_in_a_row": 1}})


def assert_same(first: TrainingState, second: TrainingState) -> None:
    for one, other in ((first.weights, second.weights), (first.ema, second.ema),
                       (first.optimizer["state"][0], second.optimizer["state"][0])):
        assert set(one) == set(other)
        assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    for name in ("progress", "lr_scheduler", "options", "config", "ema_updates", "monitors"):
        assert getattr(first, name) == getattr(second, name), name
    assert first.optimizer["param_groups"] == second.optimizer["param_groups"]


@pytest.mark.parametrize("ema", [True, False])
def test_state_reads_back_as_it_was(tmp_path, ema):
    folder = save_state(tmp_path, make_state(7, ema=ema))
    assert_same(load_state(folder), make_state(7, ema=ema))
    assert not {path.suffix for path in folder.iterdir()} - {".safetensors", ".json"}
    written = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    assert written["progress"]["accumulation_position"] == 0


def test_the_older_state_goes_when_the_newer_one_is_there(tmp_path):
    save_state(tmp_path, make_state(1))
    save_state(tmp_path, make_state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    save_state(tmp_path, make_state(2, value=5.0))
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]
    assert_same(load_state(tmp_path / "step-2"), make_state(2, value=5.0))


@pytest.mark.parametrize("kill_at", range(1, NUM_SYNCS + 1))
@pytest.mark.parametrize("step", [1, 2])
def test_a_kill_at_any_point_of_a_save_leaves_a_whole_state_and_no_manifest_of_another(tmp_path, kill_at, step):
    """Killed when it is about to wait for the disk for the n-th time. The manifest comes last: wherever there is one,
    everything that it lists is there."""
    save_state(tmp_path / "state", make_state(1))
    pid = os.fork()
    if pid == 0:
        real, calls = os.fsync, []

        def sync(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        os.fsync = sync
        save_state(tmp_path / "state", make_state(step, value=2.0))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if kill_at < NUM_SYNCS else 0)
    for manifest in tmp_path.rglob("manifest.json"):
        # an empty file is one that had no time to be written
        assert verify_state(manifest.parent) or manifest.stat().st_size == 0, f"{manifest.parent} is not whole"
    found = find_state(tmp_path, "auto")
    if kill_at < NUM_SYNCS - 1:
        assert_same(load_state(found), make_state(1))
    else:
        assert_same(load_state(found), make_state(step, value=2.0))
    remove_leftovers(tmp_path)
    assert not list((tmp_path / "state").glob(".*"))
    assert find_state(tmp_path, "auto") == found


@pytest.mark.parametrize("kill_at", range(1, 7))
def test_a_kill_while_the_older_state_is_removed_leaves_nothing_damaged_under_its_name(tmp_path, kill_at):
    save_state(tmp_path / "state", make_state(1))
    pid = os.fork()
    if pid == 0:
        real, calls = os.unlink, []

        def unlink(*args, **kwargs) -> None:
            calls.append(args)
            if len(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args, **kwargs)

        os.unlink = unlink
        save_state(tmp_path / "state", make_state(2))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if kill_at < 6 else 0)
    assert all(verify_state(folder) for folder in (tmp_path / "state").glob("step-*"))
    assert find_state(tmp_path, "auto").name == "step-2"
    remove_leftovers(tmp_path)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-2"]


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "not in the manifest"])
def test_damage_is_seen(tmp_path, name, damage):
    folder = save_state(tmp_path, make_state(1))
    path, content = folder / name, (folder / name).read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "changed":
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    elif damage == "gone":
        path.unlink()
    else:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        del manifest[name]
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        path.unlink()
    # a run without an average has a state without one; its manifest is as whole
    assert verify_state(folder) == (name == "ema.safetensors" and damage == "not in the manifest")


@pytest.mark.parametrize("manifest", ["", "[]", "{}", "null", "{\"weights.safetensors\": 3}", "\x00\xff"])
def test_a_manifest_that_is_none_is_no_crash(tmp_path, manifest):
    folder = save_state(tmp_path, make_state(1))
    (folder / "manifest.json").write_bytes(manifest.encode("latin-1"))
    assert not verify_state(folder)


@pytest.mark.parametrize("document", [[], {}, {"progress": []}, {"version": 99}, {"progress": {"step": 1, "what": 2}}])
def test_a_state_of_something_else_is_refused_in_a_sentence(tmp_path, document):
    folder = save_state(tmp_path, make_state(1))
    (folder / "state.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(UserError, match="not a state that diffsynth has written|newer version|which it should not"):
        load_state(folder)


def test_options_that_came_later_have_their_default_in_older_states():
    refuse_changed_options({"seed": 1}, {"seed": 1, "caption_dropout": 0.0})
    with pytest.raises(UserError, match=r"caption_dropout: None -> 0\.5"):
        refuse_changed_options({"seed": 1}, {"seed": 1, "caption_dropout": 0.5})


def test_a_state_is_saved_from_another_thread(tmp_path):
    thread = threading.Thread(target=save_state, args=(tmp_path, make_state(3)))
    thread.start()
    thread.join()
    assert_same(load_state(tmp_path / "step-3"), make_state(3))
