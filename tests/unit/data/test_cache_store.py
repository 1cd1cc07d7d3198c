"""The store of the cache below any training: packs, merging, claims, and several processes at once."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import diffsynth.core.data.cache as cache_module
import diffsynth.core.data.cache_care as care
from diffsynth.core.data.cache import CacheStore, check_cache_folder
from diffsynth.core.data.cache_care import choose_merge, merge_packs, removing
from diffsynth.core.data.cache_uses import claims_folder, read_uses, register_use
from diffsynth.core.data.claims import STALE_SECONDS, Claims, SignOfLife, lives
from diffsynth.core.data.file_hashes import FileHashes, hash_file, hash_files
from diffsynth.core.errors import UserError
from tests.contract.forked import Forked


def key(number: int) -> str:
    return f"{number:040x}"


def tensors(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "embeds": torch.randn(1, 3, number % 5 + 1, generator=generator).to(torch.bfloat16),
        "mask": torch.randint(0, 2, (1, 3), generator=generator).bool(),
        "scale": torch.tensor(float(number)),
        "nothing": torch.zeros(0, 4),
    }


def assert_holds(store: CacheStore, numbers) -> None:
    for number in numbers:
        found = store.get(key(number))
        assert found.keys() == tensors(number).keys()
        for name, tensor in tensors(number).items():
            assert torch.equal(found[name], tensor)
            assert found[name].dtype == tensor.dtype


@pytest.fixture
def store(tmp_path) -> CacheStore:
    return CacheStore(tmp_path)


@pytest.fixture
def claims(tmp_path):
    sign = SignOfLife(claims_folder(tmp_path))
    yield Claims(sign)
    sign.end()


def test_entries_of_one_pack_are_read_one_by_one(store, monkeypatch):
    monkeypatch.setattr(cache_module, "FLUSH_SECONDS", 1000.0)
    store.put(key(99), tensors(99))
    for number in range(20):
        assert store.add(key(number), tensors(number), "Unit") == []
    assert_holds(store, range(20))
    assert not CacheStore(store.root).has(key(3))
    assert sorted(store.flush()) == sorted(map(key, range(20)))
    assert len(list(store.folder.iterdir())) == 2
    other = CacheStore(store.root)
    assert_holds(other, [*range(20), 99])
    for path in store.folder.iterdir():
        with safe_open(path, framework="pt") as file:  # a file like any other
            assert all("/" in name for name in file.keys())  # noqa: SIM118


def test_entries_are_written_when_they_are_large_enough_or_old_enough(store, monkeypatch):
    monkeypatch.setattr(cache_module, "FLUSH_SECONDS", 1000.0)
    monkeypatch.setattr(cache_module, "FLUSH_BYTES", 1000)
    store.put(key(0), {"x": torch.zeros(1)})
    assert store.add(key(1), {"x": torch.zeros(100)}) == []
    assert store.add(key(2), {"x": torch.zeros(200)}) == [key(1), key(2)]
    assert store.add(key(3), {"x": torch.zeros(1)}) == []
    monkeypatch.setattr(cache_module, "FLUSH_SECONDS", 0.0)
    assert store.add(key(4), {"x": torch.zeros(1)}) == [key(3), key(4)]


def test_an_entry_without_tensors_is_an_entry(store):
    store.put(key(1), {})
    assert CacheStore(store.root).get(key(1)) == {}


def test_a_store_keeps_only_what_is_wanted_in_memory(store):
    for number in range(4):
        store.put(key(number), tensors(number))
    some = CacheStore(store.root, {key(1), key(2), key(9)})
    assert len(some) == 2
    assert_holds(some, [1, 2])


def test_a_reader_follows_its_entries_into_merged_packs(store, claims):
    for number in range(12):
        store.put(key(number), tensors(number))
    reader = CacheStore(store.root)
    assert merge_packs(store.folder, claims) == 12
    assert len(list(store.folder.iterdir())) == 1
    assert_holds(reader, range(12))


def test_packs_are_not_merged_by_two_processes_at_once(store, claims, tmp_path):
    for number in range(3):
        store.put(key(number), tensors(number))
    other = Claims(SignOfLife(claims_folder(tmp_path)))
    assert other.take(care.MERGING)
    assert merge_packs(store.folder, claims) == 0
    other.release_all()
    assert merge_packs(store.folder, claims) == 3


def test_a_disk_that_is_full_for_merging_is_no_reason_to_stop(store, claims, monkeypatch, caplog):
    for number in range(3):
        store.put(key(number), tensors(number))

    def full(*arguments):
        raise UserError("cannot save: No space left on device")

    monkeypatch.setattr(care, "copy_entries", full)
    assert merge_packs(store.folder, claims) == 0
    assert "No space left" in caplog.text
    assert_holds(CacheStore(store.root), range(3))


MEGABYTES = st.lists(st.floats(0.001, 2000), max_size=60)


@given(MEGABYTES)
def test_merging_ends_with_few_packs_and_copies_large_ones_seldom(sizes):
    packs = {str(number): (int(size * 2**20), 1000) for number, size in enumerate(sizes)}
    written = count = 0
    while chosen := choose_merge(packs):
        total = sum(packs.pop(name)[0] for name in chosen)
        assert total <= care.MERGED_BYTES
        packs[f"m{count}"] = total, 1000
        written, count = written + total, count + 1
        assert count < 60
    small = sorted(size for size, _ in packs.values() if size < care.MERGED_BYTES / 3)
    assert len(small) <= 8
    assert written <= 8 * (sum(int(size * 2**20) for size in sizes) + 1)


def write_and_merge(root: Path, first: int) -> None:
    cache_module.FLUSH_SECONDS = 0.0
    store, claims = CacheStore(root), Claims(SignOfLife(claims_folder(root)))
    for number in range(first, first + 30):
        store.add(key(number), tensors(number))
        merge_packs(store.folder, claims, at_least=4)


def test_reading_while_others_write_and_merge(store, tmp_path):
    for number in range(10):
        store.put(key(number), tensors(number))
    writers = [Forked(lambda first=first: write_and_merge(store.root, first)) for first in (100, 300)]
    reader, chance = CacheStore(store.root), random.Random(0)
    while any([writer.poll() is None for writer in writers]):
        assert_holds(reader, chance.sample(range(10), 3))
    assert [writer.exit_code for writer in writers] == [0, 0], [writer.said() for writer in writers]
    assert_holds(CacheStore(store.root), [*range(10), *range(100, 130), *range(300, 330)])


# claims


def test_a_claim_is_one_process_s_until_it_is_given_back(claims, tmp_path):
    other = Claims(SignOfLife(claims_folder(tmp_path)))
    assert claims.take("a")
    assert not other.take("a")
    assert other.is_held("a")
    claims.release(["a"])
    assert other.take("a")


def forge(folder: Path, name: str, age: float, **owner: object) -> None:
    """A sign of life of another machine, or of another process of this one."""
    path = folder / f"{name}.alive"
    path.write_text(json.dumps({"machine": "another", "pid": 1, "born": "", **owner}), encoding="utf-8")
    os.utime(path, (time.time() - age,) * 2)


@pytest.mark.parametrize(("age", "taken"), [(1, False), (STALE_SECONDS - 5, False), (STALE_SECONDS + 5, True)])
def test_a_claim_of_another_machine_lasts_as_long_as_its_sign_of_life_is_renewed(claims, age, taken):
    forge(claims.sign.folder, "other", age)
    (claims.sign.folder / "a.0").write_text("other", encoding="utf-8")
    assert claims.take("a") is taken
    assert (claims.sign.folder / "a.1").exists() is taken
    claims.release(["a"])
    assert (claims.sign.folder / "a.0").exists() is not taken


def test_a_claim_of_a_process_that_ended_here_is_void_at_once(claims, tmp_path):
    own = json.loads(claims.sign.path.read_text(encoding="utf-8"))
    gone = Forked(lambda: None)
    gone.wait()
    for name, changes in {"ended": {"pid": gone.pid}, "number used again": {"born": "17"}}.items():
        name = name.replace(" ", "-")
        forge(claims.sign.folder, name, 0, **{**own, **changes})
        (claims.sign.folder / f"{name}-work.0").write_text(name, encoding="utf-8")
        assert claims.take(f"{name}-work")


def test_only_one_takes_over(claims, tmp_path):
    rivals = [Claims(SignOfLife(claims_folder(tmp_path))) for _ in range(5)]
    (claims.sign.folder / "a.0").write_text("nobody", encoding="utf-8")
    assert [rival.take("a") for rival in rivals] == [True, False, False, False, False]


def test_a_claim_names_nothing_outside_its_folder(claims, tmp_path):
    forge(tmp_path, "outside", 0)
    (claims.sign.folder / "a.0").write_text("../outside", encoding="utf-8")
    assert claims.take("a")


def test_what_killed_processes_left_is_tidied_up(claims):
    forge(claims.sign.folder, "other", STALE_SECONDS + 5)
    (claims.sign.folder / "a.0").write_text("other", encoding="utf-8")
    claims.tidy()
    assert [path.name for path in claims.sign.folder.iterdir()] == [claims.sign.path.name]


def test_a_sign_of_life_ends_with_its_object(tmp_path):
    sign = SignOfLife(tmp_path)
    assert [life.is_alive for life in lives(tmp_path).values()] == [True]
    del sign
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_begins_waits_while_entries_are_removed(tmp_path):
    with removing(tmp_path):
        begun = Forked(lambda: register_use(tmp_path, [key(1)], "run"))
        time.sleep(0.5)
        assert begun.poll() is None
        assert [use.in_progress for use in read_uses(tmp_path)] == [True], "whoever removes sees it already"
    assert begun.wait() == 0


# content of files


def test_a_hash_is_remembered_only_when_a_later_change_would_show(tmp_path):
    path, memory = tmp_path / "file", tmp_path / "memory.json"
    path.write_bytes(b"first")
    fresh, settled = FileHashes(), FileHashes()
    fresh.set(path, path.stat(), "hash")
    time.sleep(0.15)
    settled.set(path, path.stat(), "hash")
    for hashes, expected in ((fresh, None), (settled, "hash")):
        hashes.save(memory)
        later = FileHashes()
        later.recall(memory)
        assert later.get(path, path.stat()) == expected
    status = path.stat()
    path.write_bytes(b"other")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert later.get(path, path.stat()) is None
    memory.write_text("{", encoding="utf-8")
    FileHashes().recall(memory)


def test_two_runs_remember_together(tmp_path):
    memory, paths = tmp_path / "memory.json", [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_text(path.name)
    time.sleep(0.15)
    for path in paths:
        hashes = FileHashes()
        hash_files([path], hashes)
        hashes.save(memory)
    both = FileHashes()
    both.recall(memory)
    assert [both.get(path, path.stat()) for path in paths] == [hash_file(path, 1) for path in paths]


def test_every_part_of_a_large_file_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("diffsynth.core.data.file_hashes._LARGE_PART", 1000)
    path = tmp_path / "file"
    content = bytearray(os.urandom(4500))
    seen = set()
    for place in (None, 0, 999, 1000, 4499):
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 1
        path.write_bytes(changed)
        seen.add(hash_file(path, 4500))
    assert len(seen) == 5


def test_a_folder_is_checked_without_being_made(tmp_path):
    check_cache_folder(tmp_path / "new" / "cache")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file"):
        check_cache_folder(tmp_path / "file" / "cache")
