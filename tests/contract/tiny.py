"""What the contract tests need of a family: tiny networks in its published layout, and how a run of it is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffsynth.config import TrainConfig
from diffsynth.core.data import UnifiedDataset
from diffsynth.diffusion.logger import ModelLogger
from diffsynth.diffusion.runner import launch_training_task
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.models.registry import get_family
from diffsynth.trainers.run import build_dataset, load_pipeline_class

REPOSITORY = Path(__file__).parents[2]
DEFAULTS: dict[str, Any] = dict(
    lora_rank=4, lora_alpha=8.0, learning_rate=1e-3, mixed_precision="no", height=32, width=32, device="cpu", seed=3)


@dataclass(frozen=True, kw_only=True)
class TinyFamily:
    """A family with networks small enough for tests.

    A module that the table in ``families.py`` names holds one as ``TINY``.
    """

    name: str
    """As in ``models/registry.py``."""
    make: Callable[[Path], Path]
    """Write tiny networks in a published layout and tokenizers; returns the folder of the files."""
    model_files: Callable[[Path], list[str]]
    """That folder -> what ``--model_paths`` is given."""
    options: Mapping[str, Any]
    """Training options of a LoRA on the denoiser (``lora_base_model``, ``lora_target_modules``, ...)."""
    recorded_names: str
    """Which tables of ``tests/data/lora_keys`` hold the names of its layers in LoRA files: ``flux1-dev``, ..."""
    diffusers_pipeline: Callable[[torch.nn.Module], Any]
    """Denoiser -> the real diffusers pipeline around it, of which only the LoRA loader is used."""
    published_width: Callable[[], torch.nn.Module]
    """One block of each kind on the meta device at the published width, which diffusers' converters may expect."""
    abstains: Mapping[str, str] = field(default_factory=dict)
    """Promise (name of its test module without ``test_``) -> why this family cannot take part in its tests."""


class FamilyAtWork:
    """A tiny family whose files lie in a folder: configurations, modules, runs in this process and in others."""

    def __init__(self, tiny: TinyFamily, folder: Path) -> None:
        self.tiny, self.folder = tiny, tiny.make(folder)
        self.name, self.family = tiny.name, get_family(tiny.name)

    @property
    def model_files(self) -> list[str]:
        return self.tiny.model_files(self.folder)

    def config(self, data: Path, output: Path, **options: Any) -> TrainConfig:
        """Options of a run; its cache lies beside the output folder."""
        cache = {} if options.get("cache") == "off" else {"cache_path": str(output.parent / f"{output.name}-cache")}
        return TrainConfig(**{
            **DEFAULTS, **self.tiny.options, "model_paths": tuple(self.model_files), "dataset_base_path": str(data),
            "output_path": str(output), **cache, **options,
        })

    def pipeline(self, deferred: bool = False) -> Any:
        """The pipeline in float32 on the CPU; deferred components are loaded when they are used."""
        names = [component.name for component in self.family.components] if deferred else []
        return load_pipeline_class(self.family).from_pretrained(
            torch.float32, "cpu", self.model_files, deferred=names)

    def module(self, config: TrainConfig) -> PipelineTrainingModule:
        return PipelineTrainingModule(self.pipeline(deferred=True), config)

    def dataset(self, config: TrainConfig) -> UnifiedDataset:
        pipe = load_pipeline_class(self.family)()
        return build_dataset(config, (pipe.height_division_factor, pipe.width_division_factor))

    def train(self, data: Path, output: Path, **options: Any) -> PipelineTrainingModule:
        """Run one training in this process and return its module."""
        import accelerate
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        config = self.config(data, output, **options)
        module = self.module(config)
        files = ModelLogger(output, config.remove_prefix_in_ckpt, config.lora_format, config.keep_checkpoints)
        launch_training_task(
            accelerate.Accelerator(cpu=True, mixed_precision="no"), self.dataset(config), module, files, config)
        return module

    def words(self, data: Path, output: Path, **options: Any) -> list[str]:
        """The same run as words for ``diffsynth train``."""
        config = self.config(data, output, **options)
        given = {name: value for name, value in config.model_dump(mode="json").items()
                 if config.origins[name] != "default" and value is not None}
        words: list[str] = []
        for name, value in given.items():
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no_{name}")
            else:
                words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        return words

    def start(self, data: Path, output: Path, **options: Any) -> subprocess.Popen[str]:
        """``diffsynth train`` as a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "diffsynth", "train", *self.words(data, output, **options)],
            env=process_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def process_environment(**more: str) -> dict[str, str]:
    """Environment of a real process in a test: one thread, no network, this checkout."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "DIFFSYNTH_SKIP_DOWNLOAD": "True",
            "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **more}


def metrics(output: Path) -> list[dict[str, Any]]:
    """Rows of a run's ``metrics.jsonl``."""
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
