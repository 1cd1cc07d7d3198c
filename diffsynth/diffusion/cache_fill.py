"""Bring the cache of the frozen prefix up to date before training starts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import TrainConfig
from ..core.errors import UserError
from ..core.loader import model_base_path
from .frozen_cache import CachedDataset, encode_job, plan_cache
from .progress import progress_bar, track
from .training_module import PipelineTrainingModule

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .base_pipeline import BasePipeline

logger = logging.getLogger(__name__)


def can_cache(model: Any, config: TrainConfig) -> bool:
    """Whether training can read cached outputs alone; a trained encoder reads the raw columns in every step."""
    return (
        config.cache != "off" and isinstance(model, PipelineTrainingModule)
        and not any(unit.models for unit in model.prefix.remaining)
    )


def fill_cache(accelerator: Accelerator, dataset: Any, model: Any, config: TrainConfig) -> CachedDataset:
    """Bring the cache of the frozen prefix up to date, all processes together.

    Raises:
        UserError: the module has nothing to cache, or ``sft:train`` finds entries missing.
    """
    if not can_cache(model, config):
        raise UserError(f"--task {config.task} works on the cache of encoded data; leave --cache at auto, and train no "
                        "text encoder and no VAE.")
    folder = Path(config.cache_path) if config.cache_path else model_base_path() / "cache"
    plan = plan_cache(model, dataset, folder)
    if config.task == "sft:train" and (missing := plan.missing()):
        raise UserError(f"the cache {folder} lacks {len(missing)} of {len(plan.jobs)} items; fill it first with "
                        "the same options and --task sft:data_process.")
    if share := plan.missing(accelerator.process_index, accelerator.num_processes):
        with progress_bar(accelerator.is_main_process) as bar, _moved_away(model.pipe):
            for job in track(bar, share):
                encode_job(model, dataset, plan.store, job)
    accelerator.wait_for_everyone()
    logger.info("cache %s: %d of %d items had to be encoded by this process", folder, len(share), len(plan.jobs))
    return CachedDataset(dataset, plan)


@contextmanager
def _moved_away(pipe: BasePipeline) -> Iterator[None]:
    """Keep the denoiser off the GPU while the encoders need the room."""
    denoiser = pipe.denoiser
    if denoiser is None or pipe.device.type == "cpu":
        yield
        return
    denoiser.to("cpu")
    try:
        yield
    finally:
        denoiser.to(pipe.device)
