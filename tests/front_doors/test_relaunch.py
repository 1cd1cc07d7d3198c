"""Several visible GPUs are used without a launcher: the command is started again under ``accelerate launch``."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
from accelerate.commands.launch import launch_command_parser

from diffsynth.core.errors import UserError
from diffsynth.trainers import run, text_to_image


@pytest.fixture
def launched(monkeypatch) -> list[list[str]]:
    """Two GPUs are visible; commands are recorded instead of run."""
    commands: list[list[str]] = []

    class Recorded(nullcontext):
        def __init__(self, command: list[str]) -> None:
            super().__init__(self)
            commands.append(command)

        def wait(self) -> int:
            return 3 if "fails.py" in commands[-1] else 0

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return commands


def parsed(command: list[str]) -> Namespace:
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    return launch_command_parser().parse_args(command[3:])


def test_script_is_started_once_per_gpu(launched):
    assert run.relaunch_on_all_gpus("auto", ["train.py", "--lora_rank", "8", "--device", "auto"])
    args = parsed(launched[0])
    assert (args.num_processes, args.multi_gpu, args.module) == (2, True, None)
    assert args.training_script == "train.py"
    assert args.training_script_args == ["--lora_rank", "8", "--device", "auto"]


def test_module_is_started_as_a_module(launched):
    assert run.relaunch_on_all_gpus("cuda", ["-m", "diffsynth", "train", "--seed", "1"])
    args = parsed(launched[0])
    assert (args.module, args.training_script) == (True, "diffsynth")
    assert args.training_script_args == ["train", "--seed", "1"]


def test_failure_ends_with_the_same_exit_code(launched):
    with pytest.raises(SystemExit) as exit_:
        run.relaunch_on_all_gpus("auto", ["fails.py"])
    assert exit_.value.code == 3


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "mps"])
def test_a_particular_device_is_used_alone(launched, device):
    assert not run.relaunch_on_all_gpus(device, ["train.py"])
    assert launched == []


def test_bad_input_is_reported_before_anything_is_started(launched):
    def check() -> None:
        raise UserError("bad")

    with pytest.raises(UserError, match="bad"):
        run.relaunch_on_all_gpus("auto", ["train.py"], check=check)
    assert launched == []


def test_under_a_launcher_nothing_is_started_again(launched, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not run.relaunch_on_all_gpus("auto", ["train.py"])
    assert launched == []


def test_one_gpu_needs_no_launcher(launched, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert not run.relaunch_on_all_gpus("auto", ["train.py"])


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_deepspeed_strategies_are_refused_by_name(stage):
    options = text_to_image.TextToImageOptions(dataset_path="data", training_strategy=f"deepspeed_stage_{stage}")
    with pytest.raises(UserError, match=f"deepspeed_stage_{stage} is not supported yet; use auto"):
        text_to_image.run(options)
