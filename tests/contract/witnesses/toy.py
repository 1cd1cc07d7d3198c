"""The training loop around a module that costs nothing: its options change what happens around the network."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffsynth.config import TrainConfig
from diffsynth.core.errors import RunStopped, StoppedEarly
from diffsynth.diffusion.loss_report import report_losses
from diffsynth.diffusion.training_module import DiffusionTrainingModule
from diffsynth.trainers.run import build_accelerator, build_dataset, check_dataset, launch
from tests.contract.tiny import metrics

from .lab import Lab

WRITERS: dict[str, str] = {}
"""File name -> thread that opened it for writing, while ``_watching`` is set."""
_watching: list[Path] = []


def _note_writer(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watching and isinstance(arguments[0], str) and str(_watching[0]) in arguments[0]:
        background = threading.current_thread() is not threading.main_thread()
        WRITERS[Path(arguments[0]).name] = "another thread" if background else "the training thread"


sys.addaudithook(_note_writer)


class ToyPipe(torch.nn.Module):
    torch_dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.toy = torch.nn.Linear(3, 1)


class Toy(DiffusionTrainingModule):
    """Learns a picture's mean colour; captions that say ``bad`` or ``spike`` have such a loss."""

    full_models = ("toy",)

    def __init__(self) -> None:
        super().__init__()
        self.pipe = ToyPipe()
        self.passes: list[dict[str, Any]] = []

    @staticmethod
    def collate(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return items

    def forward(self, items: list[dict[str, Any]]) -> torch.Tensor:
        pixels = [torch.tensor(list(item["image"].resize((1, 1)).getdata()), dtype=torch.float32) / 255
                  for item in items]
        found = self.pipe.toy(torch.cat(pixels))
        factors = torch.tensor([{"bad": math.nan, "spike": 1e4}.get(item["prompt"], 1.0) for item in items])
        losses = (found.float()[:, 0] - 1).square() * factors
        levels = torch.full((len(items),), 500.0)
        report_losses(timesteps=levels, losses=losses, weights=torch.ones(len(items)))
        self.passes.append({
            "prompts": [item["prompt"] for item in items], "sizes": [item["image"].size for item in items],
            "pixels": [hashlib.sha256(item["image"].tobytes()).hexdigest() for item in items],
            "kinds": sorted({name: type(value).__name__ for name, value in items[0].items()}.items()),
            "dtype": found.dtype, "num_workers": len(multiprocessing.active_children()), "learns": self.training
            and torch.is_grad_enabled()})
        return losses.mean()


@dataclass
class Trace:
    """What a training did."""

    rows: list[dict[str, Any]]
    passes: list[dict[str, Any]]
    files: list[str]
    weights: list[float]
    ended: str = "done"
    writers: dict[str, str] = field(default_factory=dict)

    def column(self, name: str) -> list[Any]:
        """A column of the metrics."""
        return [row.get(name) for row in self.rows]

    def saw(self, name: str) -> list[Any]:
        """What the forward passes that learn were given."""
        return [each[name] for each in self.passes if each["learns"]]


def toy_config(lab: Lab, options: dict[str, Any]) -> TrainConfig:
    defaults: dict[str, Any] = dict(
        dataset_base_path=lab.pictures, model_paths=("none",), trainable_models="toy", learning_rate=0.1,
        mixed_precision="no", device="cpu", height=32, width=32, seed=3, cache="off", output_path=str(lab.fresh()))
    return TrainConfig(**{**defaults, **options})


def loop(lab: Lab, options: dict[str, Any]) -> Trace:
    """A whole training of the toy."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    config = toy_config(lab, options)
    dataset = build_dataset(config, (16, 16))
    check_dataset(config, dataset)
    module, output, ended = Toy(), Path(config.output_path), "done"
    WRITERS.clear()
    _watching.append(output)
    try:
        launch(config, build_accelerator(config), dataset, module)
    except (RunStopped, StoppedEarly) as error:
        ended = type(error).__name__
    finally:
        _watching.clear()
    files = sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file())
    return Trace(metrics(output), module.passes, files, torch.cat([p.flatten() for p in module.parameters()]).tolist(),
                 ended, dict(WRITERS))


def loop_again(lab: Lab, options: dict[str, Any]) -> Trace:
    """A training that goes on where one of one step has left its folder."""
    folder = str(lab.fresh())
    loop(lab, dict(output_path=folder, max_steps=1))
    return loop(lab, {"output_path": folder, "max_steps": 2, **options})


def with_unused_parameters(lab: Lab, options: dict[str, Any]) -> str:
    """Two steps of a network that has an unused part, in ``DistributedDataParallel`` as the launcher sets it up."""
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    handler = build_accelerator(toy_config(lab, options)).ddp_handler
    network = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 1), "unused": torch.nn.Linear(2, 1)})
    network.forward = lambda x: network["used"](x)
    dist.init_process_group("gloo", store=dist.FileStore(str(lab.fresh()), 1), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(network, **handler.to_kwargs())
        for _ in range(2):
            wrapped(torch.ones(1, 2)).sum().backward()
    except RuntimeError as error:
        return str(error)[:60]
    finally:
        dist.destroy_process_group()
    return "done"
