"""Whether a run fits on the disk, by numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from diffsynth.config import TrainConfig
from diffsynth.core.errors import UserError
from diffsynth.diffusion.disk_space import Footprint, check_space, saves_at_least

FOOTPRINT = Footprint(state=100_000_000, weights=10_000_000)


@pytest.mark.parametrize(("num_saves", "keep", "needed"), [
    (1, None, 110), (2, None, 220), (9, None, 290),
    (9, 1, 220), (9, 3, 240), (2, 3, 220),
])
def test_two_states_and_the_weight_files_that_exist_at_once(num_saves, keep, needed):
    assert FOOTPRINT.needed(num_saves, keep) == needed * 1_000_000


def test_what_does_not_fit_is_refused_and_what_will_not_fit_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=250_000_000))
    check_space(tmp_path / "a" / "b", FOOTPRINT, 5, None)
    assert caplog.text == ""
    check_space(tmp_path / "a" / "b", FOOTPRINT, 9, None)
    assert "250.0 MB are free there, and the 9 saves of this run need about 290.0 MB" in caplog.text
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=219_000_000))
    with pytest.raises(UserError, match=r"the first 2 saves need about 220\.0 MB"):
        check_space(tmp_path / "a" / "b", FOOTPRINT, 9, 1)
    check_space(tmp_path / "a" / "b", FOOTPRINT, 1, None)


def test_files_of_the_run_that_is_continued_make_room(tmp_path, monkeypatch):
    (tmp_path / "state" / "step-3").mkdir(parents=True)
    (tmp_path / "state" / "step-3" / "weights.safetensors").write_bytes(bytes(1_500_000))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=219_000_000))
    check_space(tmp_path, FOOTPRINT, 9, 1)


@pytest.mark.parametrize(("options", "least"), [
    (dict(), 1), (dict(num_epochs=2), 2), (dict(save_steps=5), 2), (dict(save_steps=5, max_steps=5), 1),
    (dict(save_steps=5, max_steps=6), 2),
])
def test_number_of_saves_that_is_certain(options, least):
    assert saves_at_least(TrainConfig(**options)) == least
