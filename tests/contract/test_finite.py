"""No NaN reaches the weights or the disk: injected everywhere, on one process and on one of two."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffsynth.core import random
from diffsynth.core.errors import RunStopped, UserError
from diffsynth.diffusion.spikes import ENOUGH, WINDOW, SpikeDetector
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.trainers.option_checks import check_precision
from diffsynth.trainers.replay import ReplayConfig, replay
from diffsynth.trainers.run import load_pipeline_class
from tests.pictures import make_dataset

from .forked import Forked
from .injecting import Injecting, on_two_processes, spoiled

NAN, INF = math.nan, math.inf
STATE = ("weights", "optimizer", "ema")


def strict_metrics(output: Path) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl``, which must be JSON by the letter."""
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in metrics.jsonl")

    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def state_bytes(output: Path, step: int) -> dict[str, bytes]:
    return {name: (output / "state" / f"step-{step}" / f"{name}.safetensors").read_bytes() for name in STATE}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> dict[str, Any]:
    """Options that all runs here share."""
    return dict(cache_path=str(tmp_path_factory.mktemp("cache")), ema_decay=0.9, weight_decay=0.1)


@pytest.fixture(scope="module")
def two_steps(family, pictures, cache, tmp_path_factory) -> Path:
    """A run of two good steps."""
    output = tmp_path_factory.mktemp("two") / "run"
    family.train(pictures, output, max_steps=2, **cache)
    return output


@pytest.mark.parametrize(("place", "value"), [
    ("input", NAN), ("input", INF), ("loss", NAN), ("loss", INF), ("gradient", NAN), ("gradient", -INF)])
def test_a_bad_step_changes_nothing_and_is_named(family, pictures, cache, two_steps, tmp_path, caplog, place, value):
    run = spoiled(family, {3: (place, value)})
    module = run.train(pictures, tmp_path / "run", max_steps=3, **cache)
    assert state_bytes(tmp_path / "run", 3) == state_bytes(two_steps, 2)
    rows = strict_metrics(tmp_path / "run")
    assert [(row["step"], row.get("skipped"), row["loss"] is None) for row in rows] == [
        (1, None, False), (2, None, False), (3, True, True)]
    (item,), (timestep,) = module.passes[2]
    (warning,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert warning.startswith("step 3 was left out")
    assert f"item {item} (image_{item}.png, row {item + 1}) at timestep {timestep:.1f}" in warning
    assert "float32" in warning
    assert [path.name for path in (tmp_path / "run" / "replay").iterdir()] == ["step-3.safetensors"]
    assert str(tmp_path / "run" / "replay" / "step-3.safetensors") in warning


def test_training_goes_on_with_the_next_items_and_the_next_learning_rate(family, pictures, cache, tmp_path):
    options = dict(**cache, max_steps=5, lr_scheduler="linear")
    good = family.train(pictures, tmp_path / "good", **options)
    run = spoiled(family, {1: ("loss", NAN), 3: ("loss", NAN)})
    module = run.train(pictures, tmp_path / "run", **options)
    rows, straight = strict_metrics(tmp_path / "run"), strict_metrics(tmp_path / "good")
    assert [row["lr"] for row in rows] == [row["lr"] for row in straight]
    assert [bool(row.get("skipped")) for row in rows] == [True, False, True, False, False]
    assert sorted(item for items, _ in module.passes for item in items) == sorted(
        set(item for items, _ in module.passes for item in items)), "an item came twice"
    assert any(not torch.equal(a, b) for a, b in zip(
        good.trainable_parameters().values(), module.trainable_parameters().values(), strict=True))


def test_the_run_stops_after_so_many_bad_steps_in_a_row(family, pictures, cache, tmp_path):
    output, inject = tmp_path / "run", {at: ("gradient", NAN) for at in (2, 4, 5)}
    process = Forked(functools.partial(
        spoiled(family, inject).train, pictures, output, save_steps=1, max_bad_steps=2, **cache))
    assert process.wait() == 3, process.said()
    assert "step 5: 2 steps in a row" in process.said()
    assert "after step 3" in process.said()
    assert [bool(row.get("skipped")) for row in strict_metrics(output)] == [False, True, False, True, True]
    assert [path.name for path in (output / "state").iterdir()] == ["step-4"]
    assert not (output / "step-5.safetensors").exists()
    assert (output / "step-3.safetensors").exists()


def test_bad_steps_are_counted_across_a_resume(family, pictures, cache, tmp_path):
    output = tmp_path / "run"
    spoiled(family, {3: ("loss", NAN)}).train(pictures, output, max_steps=3, max_bad_steps=2, **cache)
    with pytest.raises(RunStopped, match="step 4: 2 steps in a row"):
        spoiled(family, {1: ("loss", NAN)}).train(pictures, output, resume="auto", max_bad_steps=2, **cache)


def test_one_bad_process_of_two_stops_the_step_on_both(family, pictures, cache, tmp_path):
    finals, weights = [], []
    for name, steps in (("good", 2), ("bad", 3)):
        output = tmp_path / name

        def train(output: Path = output, steps: int = steps) -> None:
            module = spoiled(family, {3: ("added", INF)}, rank=1).train(pictures, output, max_steps=steps, **cache)
            save_file(module.trainable_parameters(), output.parent / f"{output.name}-{os.environ['RANK']}.safetensors")

        processes = on_two_processes(train)
        finals.append(state_bytes(output, steps))
        weights += [(tmp_path / f"{name}-{rank}.safetensors").read_bytes() for rank in range(2)]
    assert finals[0] == finals[1]
    assert len(set(weights)) == 1, "both processes have the weights of step 2"
    assert strict_metrics(tmp_path / "bad")[2]["skipped"] is True
    (warning,) = [line for line in processes[0].said().splitlines() if line.startswith("step 3 was left out")]
    assert warning.count("image_") == 1, "only the item of the other process is named"
    assert "step-3-rank-1.safetensors" in warning
    assert "was left out" not in processes[1].said(), "the main process alone speaks"
    assert [path.name for path in (tmp_path / "bad" / "replay").iterdir()] == ["step-3-rank-1.safetensors"]


@pytest.mark.parametrize("caching", ["auto", "off"])
def test_replay_repeats_the_step(family, pictures, cache, tmp_path, caching):
    run = spoiled(family, {2: ("gradient", NAN)})
    options = dict(cache, max_steps=2, batch_size=2, gradient_accumulation_steps=2, cache=caching)
    module = run.train(pictures, tmp_path / "run", **options)
    result = replay(ReplayConfig(file=str(tmp_path / "run/replay/step-1.safetensors")))
    # nothing is wrong with the numbers themselves, so that they can be compared: every loss is the same to the bit
    assert result["reproduced"] is True
    assert all(math.isfinite(batch["loss"]) and batch["first_bad_module"] is None for batch in result["batches"])
    assert [batch["timesteps"] for batch in result["batches"]] == [times for _, times in module.passes[:2]]
    assert [len(batch["items"]) for batch in result["batches"]] == [2, 2]


def test_replay_finds_the_first_bad_layer(family, pictures, cache, tmp_path, capsys):
    seen: list[str] = []
    run = spoiled(family, {})
    make = run.module

    def watched(config: Any) -> Injecting:
        module = make(config)
        for name, layer in module.named_modules():
            def note(layer: Any, inputs: Any, output: Any, name: str = name) -> None:
                first = output[0] if isinstance(output, tuple) else output
                if isinstance(first, torch.Tensor) and not torch.isfinite(first).all():
                    seen.append(name)

            layer.register_forward_hook(note)
        return module

    run.module = watched
    with pytest.raises(RunStopped):
        run.train(pictures, tmp_path / "run", learning_rate=1e30, max_grad_norm=0.0, max_bad_steps=1, **cache)
    (path,) = (tmp_path / "run" / "replay").iterdir()
    result = replay(ReplayConfig(file=str(path)))
    assert result["reproduced"] is True
    assert result["batches"][0]["loss"] == result["loss"]
    assert result["batches"][0]["first_bad_module"] == seen[0]
    from diffsynth.cli import dispatch

    dispatch(["replay", str(path)])
    assert "the same numbers as in the run" in capsys.readouterr().out


def test_only_the_newest_replay_files_are_kept(family, pictures, cache, tmp_path):
    run = spoiled(family, {at: ("loss", NAN) for at in range(1, 7)})
    run.train(pictures, tmp_path / "run", max_bad_steps=99, **cache)
    assert sorted(path.name for path in (tmp_path / "run" / "replay").iterdir()) == [
        f"step-{step}.safetensors" for step in (3, 4, 5, 6)]


def test_replay_refuses_other_files(tmp_path, two_steps):
    with pytest.raises(UserError, match="no replay file"):
        replay(ReplayConfig(file=str(two_steps / "state/step-2/weights.safetensors")))
    with pytest.raises(UserError, match="there is no file"):
        replay(ReplayConfig(file=str(tmp_path / "nothing.safetensors")))


def test_a_bad_encoder_is_refused_before_anything_is_kept(family, pictures, tmp_path):
    config = family.config(pictures, tmp_path / "run")
    for name in family.module(config).prefix.released_models:
        run, store = copy.copy(family), tmp_path / f"cache-{name}"

        def poisoned(config: Any, name: str = name) -> PipelineTrainingModule:
            module = family.module(config)
            module.pipe.require_models([name])
            with torch.no_grad():
                for parameter in getattr(module.pipe, name).parameters():
                    parameter.fill_(NAN)
            return module

        run.module = poisoned
        with pytest.raises(UserError, match=r"item \d \(image_\d.png, row \d\): \w+ \(float32\) holds numbers"):
            run.train(pictures, tmp_path / f"run-{name}", cache_path=str(store))
        for path in store.rglob("*.safetensors"):
            assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values()), path


def test_a_picture_of_floating_point_numbers_is_refused(family, tmp_path):
    data = make_dataset(tmp_path / "data", count=2)
    Image.fromarray(np.full((64, 64), np.nan, dtype=np.float32)).save(data / "image_1.tiff")
    table = data / "metadata.csv"
    table.write_text(table.read_text(encoding="utf-8").replace("image_1.png", "image_1.tiff"), encoding="utf-8")
    with pytest.raises(UserError, match=r"row 2.*image_1\.tiff has floating-point pixels"):
        family.train(data, tmp_path / "run")


def test_every_component_is_loaded_in_a_dtype_that_is_safe_for_it(family, caplog):
    caplog.set_level("INFO")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        pipe = load_pipeline_class(family.family).from_pretrained(dtype, "cpu", family.model_files)
        for component in family.family.components:
            safe = {getattr(torch, name) for name in component.spec.safe_dtypes}
            found = {parameter.dtype for parameter in getattr(pipe, component.name).parameters()}
            assert found <= safe | {torch.float32}, f"{component.name} in {dtype}"
            if dtype not in safe:
                assert f"{component.spec.kind} is kept in" in caplog.text
            else:
                assert dtype in found


def test_a_trained_network_keeps_to_its_safe_dtype_under_autocast(family, pictures, tmp_path):
    unsafe = [component.name for component in family.family.components
              if "float16" not in component.spec.safe_dtypes and any(component.name in unit.models
                                                                     for unit in family.pipeline(deferred=True).units)]
    for name in unsafe:
        config = family.config(pictures, tmp_path / "run", trainable_models=name, cache="off")
        module, seen = family.module(config), set()
        for layer in getattr(module.pipe, name).modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                layer.register_forward_hook(lambda layer, inputs, output, seen=seen: seen.add(output.dtype))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.float16):
            module(module.collate([family.dataset(config).load(0)]))
        assert seen == {torch.float32}, name


def test_a_precision_in_which_the_denoiser_overflows_is_refused(family, pictures, tmp_path):
    config = family.config(pictures, tmp_path / "run", mixed_precision="fp16")
    denoisers = load_pipeline_class(family.family).denoiser_models
    fragile = tuple(replace(component, spec=replace(component.spec, safe_dtypes=("float32", "bfloat16")))
                    for component in family.family.components)
    with pytest.raises(UserError, match="--mixed_precision fp16: .* overflows in float16; use bf16 or no"):
        check_precision(config, replace(family.family, components=fragile), denoisers)
    check_precision(config.replace(mixed_precision="bf16"), replace(family.family, components=fragile), denoisers)


def test_a_spike_stands_out_of_noise_but_not_of_a_wide_spread():
    narrow, wide = SpikeDetector(10.0), SpikeDetector(10.0)
    numbers = torch.randn(WINDOW, generator=random.keyed_generator(0, "losses")).tolist()
    assert not any(narrow.is_spike(1 + 0.01 * number) for number in numbers)
    assert not any(wide.is_spike(1 + 0.3 * number) for number in numbers)
    assert narrow.is_spike(2.0)
    assert not wide.is_spike(2.0)
    assert not SpikeDetector(0.0).is_spike(1e9)
    fresh = SpikeDetector(10.0)
    assert [fresh.is_spike(loss) for loss in [1.0] * (ENOUGH - 1) + [99.0, 99.0]] == [False] * ENOUGH + [True]
    # the limit by the formula of the docstring: median 1, spread 5 % of it
    assert fresh.limit() == pytest.approx(1 + 10 * 0.05)
    assert sum(fresh.is_spike(9.0) for _ in range(WINDOW)) < WINDOW // 2 + 1, "a new level is no spike for ever"


@pytest.fixture(scope="module")
def ten_steps(family, pictures, cache, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("ten") / "run"
    family.train(pictures, output, dataset_repeat=4, max_steps=10, loss_spike_factor=6.0, on_loss_spike="rollback",
                 save_steps=10, **cache)
    return output


def test_a_spike_is_told_and_its_step_taken(family, pictures, cache, tmp_path, caplog):
    run = spoiled(family, {18: ("loss", 1000.0)})
    run.train(pictures, tmp_path / "run", dataset_repeat=4, max_steps=19, loss_spike_factor=6.0, **cache)
    rows = strict_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if row.get("spike")] == [18]
    assert "step 18: the loss" in caplog.text
    assert not any(row.get("skipped") for row in rows)


def test_a_spike_rolls_back_to_the_last_saved_state(family, pictures, cache, ten_steps, tmp_path, caplog):
    run, output = spoiled(family, {18: ("loss", 1000.0)}), tmp_path / "run"
    options = dict(cache, dataset_repeat=4, loss_spike_factor=6.0, on_loss_spike="rollback", save_steps=10)
    run.train(pictures, output, max_steps=18, **options)
    row = strict_metrics(output)[-1]
    assert (row["step"], row["spike"], row["rolled_back_to"], row["skipped"]) == (18, True, 10, True)
    assert state_bytes(output, 18) == state_bytes(ten_steps, 10)
    assert "weights are those of step 10 again" in caplog.text


def test_spikes_are_the_same_in_a_resumed_run(family, pictures, cache, tmp_path):
    options = dict(cache, dataset_repeat=4, loss_spike_factor=6.0)
    for output, stops in ((tmp_path / "straight", [18]), (tmp_path / "resumed", [14, 18])):
        done = 0
        for stop in stops:
            run = spoiled(family, {18 - done: ("loss", 1000.0)})
            run.train(pictures, output, max_steps=stop, resume="auto", **options)
            done = stop
    assert strict_metrics(tmp_path / "straight") == strict_metrics(tmp_path / "resumed")
    assert strict_metrics(tmp_path / "resumed")[-1]["spike"] is True
