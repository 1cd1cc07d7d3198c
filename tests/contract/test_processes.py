"""Batch size, accumulation and process count change speed, not maths: the same runs divided in many ways."""

from __future__ import annotations

import csv
import json
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.pictures import draw_picture

from .tiny import FamilyAtWork, metrics, process_environment
from .traced_runs import train_traced

CAPTIONS = ["a dog", "a photo of a red circle on a blue background", "two green squares and a yellow star", "",
            "a dog is jumping, flowers around the dog, the background is mountains and clouds"]
SIZES = [(64, 48), (48, 64), (64, 48), (64, 48), (48, 64)]
# with plain SGD and a learning rate of 1 the first change of the weights is the gradient itself
OPTIONS: dict[str, Any] = dict(
    optimizer="SGD", weight_decay=0.0, learning_rate=1.0, max_grad_norm=0.0, lr_scheduler="linear", num_epochs=2,
    save_steps=1, height=None, width=None, max_pixels=1024)


@dataclass(frozen=True)
class Division:
    """One way to divide a step: processes x batch size x accumulation."""

    processes: int
    batch_size: int
    accumulation: int
    repeat: int = 1

    @property
    def name(self) -> str:
        return f"{self.processes}p-{self.batch_size}x{self.accumulation}-r{self.repeat}"

    @property
    def alone(self) -> Division:
        """The same step, item by item in one process."""
        return Division(1, 1, self.processes * self.batch_size * self.accumulation, self.repeat)


DIVISIONS = [
    # five items in steps of 4 and 1: a process without an item in the last
    Division(1, 4, 1), Division(1, 2, 2), Division(2, 2, 1), Division(2, 1, 2),
    # ten items in steps of 8 and 2
    Division(1, 2, 4, 2), Division(2, 4, 1, 2), Division(2, 1, 4, 2),
    # five in steps of 3 and 2, ten in steps of 6 and 4
    Division(3, 1, 1), Division(3, 2, 1, 2),
]
PREVIEWED = Division(2, 2, 1)


@dataclass(frozen=True)
class Outcome:
    """What one run left."""

    rows: list[dict[str, Any]]
    weights: list[dict[str, torch.Tensor]]
    """After each step."""
    traces: list[dict[str, Any]]
    """One for each process."""

    def items(self) -> list[dict[int, tuple[float, float]]]:
        """For each step, what each item saw: timestep and loss."""
        steps: list[dict[int, tuple[float, float]]] = [{} for _ in self.rows]
        for trace in self.traces:
            passes = iter(trace["passes"])
            for number, step in enumerate(trace["steps"]):
                for items in step["items"]:
                    seen = next(passes)
                    if not items:
                        continue  # a forward pass without weight, so that the others need not wait
                    assert seen["items"] == items
                    for item, timestep, loss in zip(items, seen["timesteps"], seen["losses"], strict=True):
                        assert item not in steps[number], "an item was computed twice"
                        steps[number][item] = (timestep, loss)
            assert next(passes, None) is None
        return steps


@pytest.fixture(scope="module")
def folder(family: FamilyAtWork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every division trained, in two and three real processes over gloo, and in this one."""
    folder = tmp_path_factory.mktemp("processes")
    data = folder / "data"
    data.mkdir()
    with (data / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "prompt"])
        for index, caption in enumerate(CAPTIONS):
            draw_picture(index, SIZES[index]).save(data / f"{index}.png")
            writer.writerow([f"{index}.png", caption])
    wanted = dict.fromkeys([*(division.alone for division in DIVISIONS), *DIVISIONS])
    for division in wanted:
        if division.processes == 1:
            train_traced(options(family, folder, division), folder / "traces" / division.name)
    groups = [start(family, folder, processes, [d for d in wanted if d.processes == processes])
              for processes in (2, 3)]
    for process in (process for group in groups for process in group):
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text
    return folder


def options(family: FamilyAtWork, folder: Path, division: Division) -> dict[str, Any]:
    config = family.config(
        folder / "data", folder / division.name, **OPTIONS, batch_size=division.batch_size,
        gradient_accumulation_steps=division.accumulation, dataset_repeat=division.repeat,
        cache_path=str(folder / "cache"))
    given = {name: value for name, value in config.model_dump(mode="json").items()
             if config.origins[name] != "default"}
    if division == PREVIEWED:
        given.update(sample_prompts=["a dog"], sample_steps=1, sample_every=2)
    return given


def start(
    family: FamilyAtWork, folder: Path, processes: int, divisions: list[Division]
) -> list[subprocess.Popen[str]]:
    """Processes that train together, as a launcher would start them."""
    plan = folder / f"plan-{processes}.json"
    plan.write_text(json.dumps({d.name: options(family, folder, d) for d in divisions}), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.contract.traced_runs", str(plan)], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env=process_environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="true"))
        for rank in range(processes)
    ]


def outcome(folder: Path, division: Division) -> Outcome:
    output = folder / division.name
    rows = [row for row in metrics(output) if "lr" in row]
    traces = [json.loads((folder / "traces" / f"{division.name}-{rank}.json").read_text(encoding="utf-8"))
              for rank in range(division.processes)]
    return Outcome(rows, [load_file(output / f"step-{row['step']}.safetensors") for row in rows], traces)


@pytest.fixture(params=DIVISIONS, ids=lambda division: division.name)
def pair(request: pytest.FixtureRequest, folder: Path) -> tuple[Outcome, Outcome]:
    """A divided run, and the same one item by item in one process."""
    return outcome(folder, request.param), outcome(folder, request.param.alone)


def test_gradients_and_weights_are_equal(pair):
    divided, alone = pair
    first = [tensor for name, tensor in alone.weights[0].items() if "lora_B" in name or "up" in name]
    assert max(float(tensor.abs().max()) for tensor in first) > 1e-4
    for step, (found, expected) in enumerate(zip(divided.weights, alone.weights, strict=True), 1):
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), (step, name)


def test_items_noise_and_losses_are_equal(pair):
    divided, alone = pair
    for step, (found, expected) in enumerate(zip(divided.items(), alone.items(), strict=True), 1):
        assert sorted(found) == sorted(expected), step
        for item, (timestep, loss) in expected.items():
            assert found[item][0] == timestep, (step, item)
            # the loss of an item depends on its noise, its prompt and its picture; a batch must not mix them
            assert found[item][1] == pytest.approx(loss, abs=1e-5), (step, item)


def test_the_loss_is_the_mean_over_items(pair):
    for run in pair:
        for row, items in zip(run.rows, run.items(), strict=True):
            losses = [loss for _, loss in items.values()]
            assert row["items"] == len(losses)
            assert row["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_weights_of_the_batches_are_shares_of_the_items(pair):
    divided, _ = pair
    for steps in zip(*(trace["steps"] for trace in divided.traces), strict=True):
        window = steps[0]["window"]
        for step in steps:
            assert step["window"] == window
            assert step["weights"] == pytest.approx([len(items) / len(window) for items in step["items"]])
        assert sorted(item for step in steps for items in step["items"] for item in items) == sorted(window)


def test_the_schedule_is_a_function_of_the_optimizer_step(pair):
    divided, alone = pair
    total = len(alone.rows)
    expected = [1 - step / total for step in range(total)]
    for run in (divided, alone):
        assert [row["step"] for row in run.rows] == list(range(1, total + 1))
        assert [row["lr"] for row in run.rows] == pytest.approx(expected, abs=1e-12)


def test_timesteps_stay_float32(pair):
    divided, _ = pair
    timesteps = [timestep for trace in divided.traces for seen in trace["passes"] for timestep in seen["timesteps"]]
    assert {seen["dtype"] for trace in divided.traces for seen in trace["passes"]} == {"torch.float32"}
    as_bf16 = torch.tensor(timesteps).to(torch.bfloat16).tolist()
    assert timesteps != as_bf16


def test_every_item_is_seen_once_an_epoch_for_each_repeat(folder):
    for division in DIVISIONS:
        run = outcome(folder, division)
        for epoch in (0, 1):
            seen = [item for row, items in zip(run.rows, run.items(), strict=True) if row["epoch"] == epoch
                    for item in items]
            assert sorted(seen) == list(range(len(CAPTIONS) * division.repeat))


def test_only_the_main_process_draws_pictures(folder):
    drawn = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/samples/**/*.png"))
    assert drawn == [f"{PREVIEWED.name}/samples/step-{step:06d}/0.png" for step in (0, 2, 4)]
