"""The same run on every machine: workers that start by spawn, an ASCII locale, devices that cannot do everything."""

from __future__ import annotations

import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from PIL import Image

from diffsynth.core.device import ABILITIES, Machine, choose_device
from diffsynth.core.errors import UserError
from diffsynth.diffusion.cache_fill import fill_cache
from diffsynth.diffusion.step_plan import Request, RequestedItems, _CollateLoaded
from diffsynth.trainers.run import capable_device
from tests.pictures import make_dataset

from .tiny import process_environment

BOTH_RUNS = """\
import multiprocessing, sys
from diffsynth.cli import main

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    for words in {runs!r}:
        try:
            main(["train", *words])
        except SystemExit as ended:
            assert ended.code == 0, ended.code
"""
ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_workers_that_start_by_spawn_change_nothing(family, tmp_path):
    """Two spawned workers give the bytes that the training process gives, also where ASCII is the default encoding."""
    data = make_dataset(tmp_path / "data", count=4)
    metadata = data / "metadata.csv"
    metadata.write_text(metadata.read_text(encoding="utf-8").replace("a red", "ein rötlicher 小狗"), encoding="utf-8")
    options = dict(cache="off", random_flip=True, batch_size=2, caption_dropout=0.5, num_epochs=1)
    runs = [family.words(data, tmp_path / str(count), **options, dataset_num_workers=count) for count in (0, 2)]
    script = tmp_path / "run.py"
    script.write_text(BOTH_RUNS.format(runs=runs), encoding="utf-8")
    finished = subprocess.run([sys.executable, str(script)], env=process_environment(**ASCII_LOCALE), text=True,
                              capture_output=True, check=False, timeout=300, encoding="utf-8")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for name in ("metrics.jsonl", "epoch-0.safetensors"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def sent(value):
    """What a process that was started by spawn receives of it."""
    return pickle.loads(bytes(ForkingPickler.dumps(value)))


def content(value):
    """Pictures and tensors by their bytes, within lists and dictionaries."""
    if isinstance(value, dict):
        return {name: content(part) for name, part in value.items()}
    if isinstance(value, list):
        return [content(part) for part in value]
    if isinstance(value, Image.Image):
        return value.size, value.tobytes()
    return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("cached", [False, True])
def test_what_goes_to_workers_can_be_sent(family, tmp_path, cached):
    """No lambda, no closure, no lock, and not the networks."""
    import accelerate

    data = make_dataset(tmp_path / "data", count=2)
    config = family.config(data, tmp_path / "out", random_flip=True, caption_dropout=0.5)
    module, dataset = family.module(config), family.dataset(config)
    if cached:
        dataset = fill_cache(accelerate.Accelerator(cpu=True), dataset, module, config)
    items = RequestedItems(dataset, config.seed, config.caption_dropout)
    assert len(ForkingPickler.dumps(items)) < 100_000
    assert len(ForkingPickler.dumps(_CollateLoaded(module.collate))) < 1000
    requests = [Request(item, epoch) for item in range(len(dataset)) for epoch in range(2)]
    here = [module.collate([items[request]]) for request in requests]
    there, collate = sent(items), sent(_CollateLoaded(module.collate))
    for request, expected in zip(requests, here, strict=True):
        lost, received = collate([there[request]])
        assert not lost
        assert content(received) == content(expected)


CUDA, OLD_CUDA = Machine(kind="cuda"), Machine(kind="cuda", has_bfloat16=False)
MPS, OLD_MPS, CPU = Machine(kind="mps"), Machine(kind="mps", has_bfloat16=False), Machine(kind="cpu")
ALL = {"cuda": CUDA, "old cuda": OLD_CUDA, "mps": MPS, "old mps": OLD_MPS, "cpu": CPU}


@pytest.mark.parametrize(("ability", "able"), [
    ("float16 training", {"cuda", "old cuda"}),
    ("bfloat16", {"cuda", "mps", "cpu"}),
    ("float8 storage", {"cuda", "old cuda", "cpu"}),
    ("several processes", {"cuda", "old cuda", "cpu"}),
    ("pinned memory", {"cuda", "old cuda"}),
    ("float64", {"cuda", "old cuda", "cpu"}),
])
def test_what_each_kind_of_device_can_do(ability, able):
    assert {name for name, machine in ALL.items() if machine.can(ability)} == able


def test_every_ability_is_in_the_table_above():
    cases = test_what_each_kind_of_device_can_do.pytestmark[0].args[1]
    assert {ability for ability, _ in cases} == set(ABILITIES)


@pytest.mark.parametrize(("machine", "options", "environment", "message"), [
    (CPU, dict(mixed_precision="fp16"), {}, "--mixed_precision fp16 needs a GPU with CUDA or ROCm, .* is on cpu; use"),
    (MPS, dict(mixed_precision="fp16"), {}, "--mixed_precision fp16 needs a GPU .* is on mps; use --mixed_precision"),
    (OLD_CUDA, dict(mixed_precision="bf16"), {}, "--mixed_precision bf16 needs .*bfloat16.* is on cuda; use float16"),
    (OLD_MPS, dict(mixed_precision="bf16"), {}, "--mixed_precision bf16 needs .*macOS 14"),
    (MPS, dict(fp8_models="dit"), {}, "--fp8_models needs a device that knows float8.* is on mps"),
    (MPS, {}, {"WORLD_SIZE": "2"}, "training with 2 processes needs .* is on mps; start one process"),
])
def test_what_a_device_cannot_do_is_refused_by_name(family, pictures, tmp_path, monkeypatch, machine, options,
                                                     environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = family.config(pictures, tmp_path / "out", **options)
    with pytest.raises(UserError, match=message):
        capable_device(config, machine)
    assert not (tmp_path / "out").exists()


def test_a_refusal_comes_before_any_file_is_looked_at(family, tmp_path):
    from diffsynth.trainers.run import check_run

    config = family.config(tmp_path, tmp_path / "out", mixed_precision="fp16", model_paths=("nowhere.safetensors",),
                           fp8_models="dit")
    with pytest.raises(UserError, match="--mixed_precision fp16 needs"):
        check_run(config)


@pytest.mark.parametrize("machine", ALL.values(), ids=ALL)
def test_what_a_device_can_do_is_not_refused(machine):
    machine.require({name: "asked" if machine.can(name) else None for name in ABILITIES})


@pytest.mark.parametrize("name", ["meta", "xpu", "quantum", "cuda:-1", ""])
def test_other_devices_are_refused(name):
    with pytest.raises(UserError, match=r"device '.*' is not (known|supported); use auto, cpu, cuda, cuda:N or mps"):
        choose_device(name)
