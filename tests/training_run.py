"""Train the tiny FLUX in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffsynth import FluxImagePipeline
from diffsynth.config import TrainConfig
from diffsynth.core.data import UnifiedDataset
from diffsynth.diffusion.logger import ModelLogger
from diffsynth.diffusion.runner import launch_training_task
from diffsynth.diffusion.training_module import PipelineTrainingModule
from tests.tiny_flux import model_files

DEFAULTS: dict[str, Any] = dict(
    lora_base_model="dit", lora_target_modules="to_q,to_k,to_v", lora_rank=4, learning_rate=1e-3, mixed_precision="no",
    height=32, width=32, device="cpu", max_sequence_length=16, batch_size=1, seed=3,
)


def make_config(output_path: Path, **options: Any) -> TrainConfig:
    cache_path = str(output_path.parent / f"{output_path.name}-cache")
    return TrainConfig(**{**DEFAULTS, "output_path": str(output_path), "cache_path": cache_path, **options})


def make_module(flux_folder: Path, config: TrainConfig) -> PipelineTrainingModule:
    deferred = [component.name for component in FluxImagePipeline.family().components]
    pipe = FluxImagePipeline.from_pretrained(torch.float32, "cpu", model_files(flux_folder), deferred=deferred)
    return PipelineTrainingModule(pipe, config)


def make_data(folder: Path, config: TrainConfig) -> UnifiedDataset:
    return UnifiedDataset(
        base_path=str(folder), metadata_path=str(folder / "metadata.csv"), repeat=config.dataset_repeat,
        data_file_keys="image", seed=config.seed,
        main_data_operator=UnifiedDataset.default_image_operator(
            base_path=str(folder), height=config.height, width=config.width, max_pixels=config.max_pixels,
            center_crop=config.center_crop, random_flip=config.random_flip),
    )


def train_tiny(flux_folder: Path, data: Path, output_path: Path, **options: Any) -> PipelineTrainingModule:
    """Run one training and return its module."""
    import accelerate
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    config = make_config(output_path, **options)
    module = make_module(flux_folder, config)
    files = ModelLogger(output_path, config.remove_prefix_in_ckpt, config.lora_format, config.keep_checkpoints)
    launch_training_task(
        accelerate.Accelerator(cpu=True, mixed_precision="no"), make_data(data, config), module, files, config)
    return module
