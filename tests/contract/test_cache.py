"""Promise 5: the cache is never stale and never redone."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import diffsynth.core.data.cache as cache_module
import diffsynth.core.data.files as files
import diffsynth.diffusion.frozen_cache as frozen_cache
from diffsynth.cli import main
from diffsynth.core.data import Operator, RandomOperator
from diffsynth.core.data.cache import CacheStore
from diffsynth.core.errors import StoppedEarly, UserError
from tests.pictures import draw_picture, make_dataset

from .cache_changes import CHANGES, Case, Change, encodings, units_of
from .forked import Forked
from .tiny import FamilyAtWork

pytestmark = pytest.mark.filterwarnings("ignore:This process")


@pytest.fixture(scope="module")
def filled(family, pictures, tmp_path_factory) -> Path:
    """A cache that holds everything of the six pictures; not to be changed."""
    folder = tmp_path_factory.mktemp(f"{family.name}-cache")
    with encodings() as counts:
        Case(family, pictures, folder / "first", folder / "cache").fill()
    assert sum(counts.values()) == num_entries(family)
    return folder / "cache"


@pytest.fixture(scope="module")
def growing(filled, tmp_path_factory) -> Path:
    """A copy of it, to which what each change needs is added."""
    return Path(shutil.copytree(filled, tmp_path_factory.mktemp("growing") / "cache"))


@pytest.fixture
def new_case(family, pictures, tmp_path) -> Case:
    """Six pictures and no cache yet."""
    return Case(family, pictures, tmp_path / "case", tmp_path / "cache")


@pytest.fixture
def filled_case(family, pictures, filled, tmp_path) -> Case:
    """Six pictures and a copy of their cache."""
    return Case(family, pictures, tmp_path / "case", Path(shutil.copytree(filled, tmp_path / "cache")))


def num_entries(family: FamilyAtWork) -> int:
    return 6 * len(units_of(family))


def run(*words: object) -> int:
    """``diffsynth cache`` in this process; returns its exit code."""
    with pytest.raises(SystemExit) as left:
        main(["cache", *map(str, words)])
    return left.value.code or 0


def answer(capsys, *words: object) -> dict[str, Any]:
    """The same with ``--json``: what it says."""
    capsys.readouterr()
    assert run(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def pack(cache: Path) -> Path:
    (found,) = (cache / "packs").glob("*.safetensors")
    return found


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name.replace(" ", "_"))
def test_what_depends_on_a_change_is_encoded_again_alone(family, pictures, growing, tmp_path, change: Change):
    case = Case(family, pictures, tmp_path, growing)
    change.apply(case)
    with encodings() as counts:
        case.fill()
    assert dict(counts) == change.expected(case)
    with encodings() as counts:
        case.fill()
    assert not counts


def test_a_new_version_of_a_unit_does_not_use_older_entries(family, filled_case, monkeypatch):
    for unit, _ in units_of(family):
        monkeypatch.setattr(type(unit), "version", 2)
        with encodings() as counts:
            filled_case.fill()
        assert dict(counts) == {type(unit).__name__: 6}


def test_the_length_of_captions_that_a_family_takes_is_part_of_their_keys(filled_case, monkeypatch):
    """Another denoiser may mean another length, with the same text encoders and no option changed."""
    pipeline = type(filled_case.pipeline())
    monkeypatch.setattr(pipeline, "token_limits", lambda self, length=None: dict.fromkeys(self.family().tokenizers, 5))
    with encodings() as counts:
        filled_case.fill()
    assert sum(counts.values()) == sum(6 for _, columns in units_of(filled_case.family) if "prompt" in columns)


def test_training_on_the_cache_equals_training_without_it(family, pictures, tmp_path):
    cached = family.train(pictures, tmp_path / "cached", max_steps=3).trainable_parameters()
    direct = family.train(pictures, tmp_path / "direct", max_steps=3, cache="off").trainable_parameters()
    for name, parameter in cached.items():
        assert torch.allclose(parameter, direct[name], rtol=0, atol=1e-6), name


def test_a_full_cache_needs_no_encoder_and_a_run_lets_them_go(family, filled_case, monkeypatch):
    names = {name for unit, _ in units_of(family) for name in unit.models}
    loaded = []
    for cache in (filled_case.cache, filled_case.folder / "empty"):
        pipeline = type(filled_case.pipeline())
        real = pipeline.require_models
        monkeypatch.setattr(pipeline, "require_models", lambda pipe, asked, real=real: real(pipe, loaded.append(
            list(asked)) or loaded[-1]))
        loaded.clear()
        module = family.train(filled_case.data, filled_case.folder / cache.name, max_steps=1, cache_path=str(cache))
        assert all(getattr(module.pipe, name) is None for name in names)
        assert bool(names & {name for asked in loaded for name in asked}) == (cache.name == "empty")


def test_flips_and_captions_are_encoded_once_each_and_not_with_each_other(new_case):
    rows = [{**row, "prompt": [row["prompt"], f"again {row['prompt']}"]} for row in new_case.rows()]
    (new_case.data / "metadata.csv").unlink()
    (new_case.data / "metadata.json").write_text(json.dumps(rows), encoding="utf-8")
    new_case.options |= {"random_flip": True, "caption_dropout": 0.5}
    with encodings() as counts:
        cached = new_case.fill()
    for unit, columns in units_of(new_case.family):
        captions, mirrored = ("prompt" in columns), (columns != {"prompt"})
        # the empty caption is one for all rows
        assert counts[type(unit).__name__] == (12 if mirrored != captions else 6 * 2 * 2) + captions * (not mirrored)
    samples = [cached.load(item, variant, drop) for item in range(6) for variant in range(4) for drop in (False, True)]
    for name in samples[0]:
        different = {sample[name].numpy().tobytes() for sample in samples}
        assert len(different) in (12, 13), name
    empty = [cached.load(item, 0, drop_caption=True) for item in (0, 5)]
    assert any(torch.equal(first, second) for first, second in zip(*(sample.values() for sample in empty), strict=True))


@dataclass(frozen=True)
class Jitter(RandomOperator):
    """Chance without a bound that would be worth its entries."""

    purpose = "jitter"
    num_variants = 1000

    def apply_random(self, value: Any, variant: int, generator: torch.Generator | None) -> Any:
        return value


def test_a_picture_with_too_many_variants_is_refused_by_name(new_case):
    module = new_case.module()
    dataset = new_case.family.dataset(module.config)
    operators: dict[str, Operator] = dataset.rows.operators
    operators["image"] = operators["image"] >> Jitter()
    dataset._radices = {"jitter": 1000}
    with pytest.raises(UserError, match="1000 different samples of each row.*--cache off"):
        frozen_cache.plan_cache(module, dataset, dataset.file_hashes)


def test_the_cached_data_set_goes_to_worker_processes(filled_case):
    cached = filled_case.fill()
    sent = pickle.dumps(cached)
    assert len(sent) < 50_000
    for name, tensor in pickle.loads(sent).load(3).items():
        assert torch.equal(tensor, cached.load(3)[name])


# files that were hashed


def test_a_second_start_reads_no_picture_and_no_weights(filled_case, monkeypatch):
    time.sleep(0.15)  # a file that has just been written could change again within one tick of the clock
    filled_case.fill()
    read = []
    monkeypatch.setattr(files, "hash_file", lambda path, size: read.append(path))
    monkeypatch.setattr("diffsynth.core.data.file_hashes.hash_file", lambda path, size: read.append(path))
    with encodings() as counts:
        filled_case.fill()
    assert read == []
    assert not counts


def test_a_changed_picture_of_equal_size_and_time_is_noticed(filled_case):
    path = filled_case.data / "image_2.png"
    draw_picture(2).save(filled_case.folder / "a.bmp")
    draw_picture(3).save(filled_case.folder / "b.bmp")
    shutil.copy(filled_case.folder / "a.bmp", path)
    time.sleep(0.15)
    filled_case.fill()
    status = path.stat()
    path.write_bytes((filled_case.folder / "b.bmp").read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    with encodings() as counts:
        filled_case.fill()
    assert sum(counts.values()) == sum(columns != {"prompt"} for _, columns in units_of(filled_case.family))


# several processes, and their ends


def fill_slowly(case: Case, log: Path, seconds: float, flush: float = 0.0, limit_at: int | None = None) -> None:
    """Fill the cache in a process of its own: a line in ``log`` for everything that is encoded."""
    cache_module.FLUSH_SECONDS = flush
    real = frozen_cache.run_unit

    def noted(unit: Any, *arguments: Any) -> Any:
        if unit.outputs:
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{type(unit).__name__}\n")
            time.sleep(seconds)
            if limit_at is not None and log.read_text(encoding="utf-8").count("\n") == limit_at:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        return real(unit, *arguments)

    frozen_cache.run_unit = noted
    case.fill()


def lines(log: Path) -> int:
    return log.read_text(encoding="utf-8").count("\n") if log.exists() else 0


@pytest.fixture
def start() -> Iterator[Callable[..., Forked]]:
    """Starts processes, and ends those that are left."""
    started: list[Forked] = []

    def begin(function: Callable[[], object]) -> Forked:
        started.append(Forked(function))
        return started[-1]

    yield begin
    for process in started:
        process.send(signal.SIGKILL)
        process.wait()


def test_after_a_kill_only_the_rest_is_encoded(new_case, start, tmp_path):
    log = tmp_path / "log"
    killed = start(lambda: fill_slowly(new_case, log, seconds=0.05))
    assert killed.send_when(signal.SIGKILL, lambda: lines(log) == 7)
    killed.wait()
    stored = len(CacheStore(new_case.cache))
    assert stored == 6
    before = time.monotonic()
    with encodings() as counts:
        new_case.fill()
    assert sum(counts.values()) == num_entries(new_case.family) - stored
    assert time.monotonic() - before < 10, "the claims of a killed process are void at once"


def test_two_processes_share_the_work_with_no_process_group(new_case, start, tmp_path):
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    processes = [start(lambda log=log: fill_slowly(new_case, log, seconds=0.05)) for log in logs]
    assert [process.wait() for process in processes] == [0, 0], processes[0].said() + processes[1].said()
    assert sum(map(lines, logs)) == num_entries(new_case.family)
    assert min(map(lines, logs)) >= 2
    assert len(CacheStore(new_case.cache)) == num_entries(new_case.family)
    assert list((new_case.cache / "claims").iterdir()) == []


def test_what_a_process_had_claimed_is_taken_over_when_it_is_killed(new_case, start, tmp_path):
    log = tmp_path / "log"
    stuck = start(lambda: fill_slowly(new_case, log, seconds=100))
    while not lines(log):
        time.sleep(0.01)
    killer = threading.Timer(1.5, lambda: os.kill(stuck.pid, signal.SIGKILL))
    killer.start()
    began = time.monotonic()
    with encodings() as counts:
        new_case.fill()
    assert sum(counts.values()) == num_entries(new_case.family)
    assert time.monotonic() - began > 1.0, "the claim of a process that is alive was not respected"


def test_what_was_encoded_stays_when_the_run_is_asked_to_end(new_case, monkeypatch):
    monkeypatch.setattr(cache_module, "FLUSH_SECONDS", 1000.0)
    calls = iter(range(1000))

    def stop() -> None:
        if next(calls) == 5:
            raise StoppedEarly("stopped")

    with encodings() as counts, pytest.raises(StoppedEarly):
        new_case.fill(stop)
    assert len(CacheStore(new_case.cache)) == sum(counts.values()) == 5
    with encodings() as counts:
        new_case.fill()
    assert sum(counts.values()) == num_entries(new_case.family) - 5


def test_a_full_disk_ends_in_one_sentence_and_keeps_what_is_there(new_case, start, tmp_path):
    log = tmp_path / "log"
    process = start(lambda: fill_slowly(new_case, log, seconds=0, limit_at=5))
    assert process.wait() == 2
    (said,) = [line for line in process.said().splitlines() if line.startswith("error: ")]
    assert str(new_case.cache) in said
    assert "cannot be written" in said
    assert all(path.name.endswith(".safetensors") and not path.name.startswith(".")
               for path in (new_case.cache / "packs").iterdir())
    with encodings() as counts:
        new_case.fill()
    assert sum(counts.values()) == num_entries(new_case.family) - 4


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_encoded(new_case, tmp_path):
    (tmp_path / "file").write_text("")
    new_case.cache = tmp_path / "file" / "cache"
    with encodings() as counts, pytest.raises(UserError, match="cannot be written.*--cache_path"):
        new_case.fill()
    assert not counts


# damage, and care


def spoil(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def test_damage_is_found_when_an_entry_is_read_and_by_verify_which_mends_it(filled_case, capsys):
    cached = filled_case.fill()
    spoil(pack(filled_case.cache))
    assert run("verify", filled_case.cache, "--json") == 2
    said = capsys.readouterr()
    (damaged,) = json.loads(said.out)["damaged"]
    assert "1 of" in said.err
    with pytest.raises(UserError, match=f"{damaged['key']}.*--repair"):
        for item in range(6):
            cached.load(item)
    assert run("verify", filled_case.cache, "--repair") == 0
    assert run("verify", filled_case.cache) == 0
    with encodings() as counts:
        filled_case.fill()
    assert dict(counts) == {damaged["made_by"].partition(" (")[0]: 1}


def test_a_pack_that_is_cut_short_is_made_anew(filled_case, caplog, capsys):
    path = pack(filled_case.cache)
    path.write_bytes(path.read_bytes()[:-10])
    assert run("verify", filled_case.cache, "--json") == 2
    assert [found["pack"] for found in json.loads(capsys.readouterr().out)["unreadable_packs"]] == [path.name]
    with encodings() as counts:
        filled_case.fill()
    assert sum(counts.values()) == num_entries(filled_case.family)
    assert "made anew" in caplog.text
    assert run("verify", filled_case.cache, "--repair") == 0
    assert not path.exists()


def test_stats_say_what_is_there_who_made_it_and_who_uses_it(filled_case, capsys, monkeypatch):
    cached = filled_case.fill()
    CacheStore(filled_case.cache).put("ab" * 20, {"x": torch.zeros(10)}, "Other")
    found = answer(capsys, "stats", filled_case.cache)
    count = num_entries(filled_case.family)
    assert (found["entries"], found["packs"]) == (count + 1, 2)
    assert found["bytes"] == sum(path.stat().st_size for path in (filled_case.cache / "packs").iterdir())
    assert (found["unused_entries"], found["unused_bytes"]) == (1, 40)
    assert sum(row["entries"] for row in found["by_unit"]) == count + 1
    assert any(row["in_progress"] and row["entries"] == count for row in found["by_run"])
    del cached
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(filled_case.cache.parent))
    assert run("stats") == 0
    assert "Other" in capsys.readouterr().out


def test_prune_removes_what_was_not_used_and_never_what_a_run_in_progress_uses(filled_case, capsys):
    cached = filled_case.fill()
    count = num_entries(filled_case.family)
    store = CacheStore(filled_case.cache)
    store.put("ab" * 20, {"x": torch.zeros(10)})
    for path in (filled_case.cache / "packs").iterdir():
        os.utime(path, (1, 1))
    words = ("prune", filled_case.cache, "--unused_for_days", 1)
    assert answer(capsys, *words, "--dry_run")["removed"]["entries"] == 1
    assert len(CacheStore(filled_case.cache)) == count + 1
    assert run(*words) == 0
    assert len(CacheStore(filled_case.cache)) == count
    assert answer(capsys, "prune", filled_case.cache, "--max_gb", 0)["in_progress"]["entries"] == count
    assert cached.load(5)
    del cached
    for path in (filled_case.cache / "uses").iterdir():
        os.utime(path, (1, 1))
    assert run(*words) == 0
    assert len(CacheStore(filled_case.cache)) == 0
    assert list((filled_case.cache / "uses").iterdir()) == []


def test_prune_to_a_size_keeps_what_was_used_last(family, filled_case, capsys, tmp_path):
    more = Case(family, make_dataset(tmp_path / "more", count=8), tmp_path / "other", filled_case.cache)
    older = set((filled_case.cache / "uses").iterdir())
    more.fill()
    for path in older:
        os.utime(path, (1, 1))
    newer = json.loads((set((filled_case.cache / "uses").iterdir()) - older).pop().read_text())["keys"]
    size = sum(record.num_bytes for pack in CacheStore(filled_case.cache).packs.values()
               for key, record in pack.records.items() if key[:16] in newer)
    assert run("prune", filled_case.cache, "--max_gb", size / 1e9) == 0
    assert {key[:16] for pack in CacheStore(filled_case.cache).packs.values() for key in pack.records} == set(newer)
    with encodings() as counts:
        more.fill()
    assert not counts


def test_prune_asks_what_may_go(filled_case, capsys):
    assert run("prune", filled_case.cache) == 2
    assert "--unused_for_days" in capsys.readouterr().err
    assert run("stats", filled_case.cache / "nowhere") == 2
