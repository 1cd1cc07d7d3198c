"""Packs against one file per entry: how long a start with a full cache takes, and how long an item takes to read.

    python benchmarks/cache_speed.py --count 10000

Both layouts hold the same entries, and are timed in turns. The older one is what this project had before packs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from diffsynth.core.data.cache import CacheStore
from diffsynth.core.data.cache_care import merge_packs
from diffsynth.core.data.cache_uses import claims_folder
from diffsynth.core.data.claims import Claims, SignOfLife
from diffsynth.core.data.file_hashes import FileHashes
from diffsynth.diffusion.frozen_cache import CachePlan, plan_cache
from diffsynth.diffusion.training_module import PipelineTrainingModule
from tests.contract.conftest import tiny_families
from tests.contract.tiny import FamilyAtWork
from tests.pictures import make_dataset


class OneFileEach:
    """The older layout."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        return self.path(key).exists()

    def get(self, key: str) -> dict[str, torch.Tensor]:
        return load_file(self.path(key))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="rows, whose captions all differ")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=32_768, help="numbers in an entry, of two bytes each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), options.count, options.rounds, options.size)


def measure(folder: Path, count: int, rounds: int, size: int) -> None:
    family = FamilyAtWork(tiny_families()[0], folder / "models")
    pictures = make_dataset(folder / "pictures", count=count)
    config = family.config(pictures, folder / "out", task="sft:data_process")
    module = PipelineTrainingModule(family.pipeline(deferred=True), config)
    time.sleep(0.2)  # what has just been written is not remembered
    memory, weights = folder / "memory.json", FileHashes()

    def plan(remembered: bool) -> CachePlan:
        dataset = family.dataset(config)
        if remembered:
            dataset.file_hashes.recall(memory)
        found = plan_cache(module, dataset, weights)
        if not remembered:
            dataset.file_hashes.save(memory)
        return found

    keys = sorted(plan(remembered=False).keys())
    write(folder, keys, size)
    report("plan, files read", [timed(lambda: plan(False)) for _ in range(rounds)])
    report("plan, files known from the run before", [timed(lambda: plan(True)) for _ in range(rounds)])
    layouts: dict[str, Callable[[], Any]] = {
        "packs": lambda: CacheStore(folder / "packed", keys), "one file each": lambda: OneFileEach(folder / "single")}
    is_full: dict[str, list[float]] = {name: [] for name in layouts}
    for _ in range(rounds):
        for name, make in layouts.items():
            is_full[name].append(timed(lambda make=make: [store.has(key) for store in [make()] for key in keys]))
    for name, times in is_full.items():
        report(f"is it full?, {name}", times)
    stores = {name: make() for name, make in layouts.items()}
    reads: dict[str, list[float]] = {name: [] for name in layouts}
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0)).tolist()
    for number in order * 2:
        for name in (list(stores) if number % 2 else list(reversed(stores))):
            reads[name].append(timed(partial(read_all, stores[name], keys[number])))
    for name, times in reads.items():
        report(f"read an entry of {2 * size / 1e3:.0f} kB, {name}", times[len(keys):])
    for name in ("packed", "single"):
        files = [path for path in (folder / name).rglob("*") if path.is_file()]
        size_mb = sum(path.stat().st_size for path in files) / 1e6
        print(f"{name}: {len(keys)} entries in {len(files)} files, {size_mb:.1f} MB")


def read_all(store: Any, key: str) -> float:
    """Read an entry and touch every number: a file that is mapped is read only then."""
    return sum(tensor.sum().item() for tensor in store.get(key).values())


def write(folder: Path, keys: list[str], size: int) -> None:
    packed, single = CacheStore(folder / "packed"), OneFileEach(folder / "single")
    for number, key in enumerate(keys):
        entry = {"latents": torch.randn(1, size, generator=torch.Generator().manual_seed(number)).bfloat16()}
        packed.add(key, entry)
        single.path(key).parent.mkdir(parents=True, exist_ok=True)
        save_file(entry, single.path(key))
    packed.flush()
    sign = SignOfLife(claims_folder(folder / "packed"))
    merge_packs(packed.folder, Claims(sign))
    sign.end()
    assert all(torch.equal(packed.get(key)["latents"], single.get(key)["latents"]) for key in keys[::100])


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def report(what: str, times: list[float]) -> None:
    median = statistics.median(times)
    shown = f"{median:.3f} s" if median > 0.1 else f"{median * 1e3:.3f} ms"
    print(f"{what:<48}{shown:>12}   ({len(times)} times, least {min(times) * 1e3:.3f} ms)")


if __name__ == "__main__":
    main()
