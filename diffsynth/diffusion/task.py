"""One training run as the loop sees it: what is set up before the first step, saving and previews."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..config import TrainConfig
from .cache_fill import can_cache, fill_cache
from .checkpoint import Progress, TrainingState, find_state, load_state, refuse_changed_options, save_state
from .logger import ModelLogger
from .optim import build_lr_scheduler, build_optimizer
from .previews import Previews
from .step_plan import RequestedItems, StepPlan
from .training_module import DiffusionTrainingModule, PipelineTrainingModule

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

OPTIONS_THAT_MAY_CHANGE = frozenset((
    "output_path", "resume", "device", "dataset_num_workers", "num_epochs", "max_steps", "save_steps",
    "keep_checkpoints", "logger", "cache", "cache_path", "sample_prompts", "sample_every", "sample_steps",
    "sample_cfg_scale", "find_unused_parameters", "use_gradient_checkpointing", "use_gradient_checkpointing_offload",
    "dataset_base_path", "dataset_metadata_path", "model_paths", "tokenizer_path", "lora_format",
    "remove_prefix_in_ckpt", "checkpoint_names", "batch_size", "gradient_accumulation_steps",
))
"""Options that a resumed run may change, because they change what is written or how fast, not what is learned. Batch
size and accumulation may change against each other; their product is compared on its own."""


class TrainingTask:
    """What the loop works with, set up in order, and what it asks for between steps."""

    def __init__(
        self, accelerator: Accelerator, dataset: Any, model: DiffusionTrainingModule, model_logger: ModelLogger,
        config: TrainConfig,
    ) -> None:
        self.accelerator, self.model, self.files, self.config = accelerator, model, model_logger, config
        self.is_main = accelerator.is_main_process
        self.parameters = model.trainable_parameters()
        optimizer = build_optimizer(self.parameters.values(), config)
        self.previews = self._prepare_previews()
        dataset = self._cache(dataset)
        self.items = RequestedItems(dataset, config.seed, config.caption_dropout)
        self.plan = StepPlan(
            _buckets(dataset, config.batch_size * config.gradient_accumulation_steps * accelerator.num_processes),
            batch_size=config.batch_size, accumulation_steps=config.gradient_accumulation_steps,
            num_processes=accelerator.num_processes, rank=accelerator.process_index, seed=config.seed,
            steps_per_epoch=config.steps_per_epoch,
        )
        self.total_steps = self.plan.steps_per_epoch * config.num_epochs
        if config.max_steps:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.lr_scheduler = build_lr_scheduler(optimizer, config, self.total_steps)
        # frozen weights are read by every process from its own files: sending them costs time, and fails where the
        # processes hold different ones (the VAE of the previews) or ones that cannot be sent (float8)
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        model._ddp_params_and_buffers_to_ignore = [*frozen, *(name for name, _ in model.named_buffers())]  # type: ignore[assignment]
        self.network, self.optimizer = accelerator.prepare(model, optimizer)
        self.progress = Progress()

    def _prepare_previews(self) -> Previews | None:
        config = self.config
        if not (config.sample_prompts and self.is_main and isinstance(self.model, PipelineTrainingModule)):
            return None
        pipe = self.model.pipe
        side = math.isqrt(config.max_pixels)
        return Previews(
            pipe, config.sample_prompts, self.files.output_path,
            height=config.height or side // pipe.height_division_factor * pipe.height_division_factor,
            width=config.width or side // pipe.width_division_factor * pipe.width_division_factor,
            num_inference_steps=config.sample_steps, cfg_scale=config.sample_cfg_scale, seed=config.seed,
        )

    def _cache(self, dataset: Any) -> Any:
        """Encode the frozen prefix once, then let go of the models that only it needs."""
        model = self.model
        if self.config.task == "sft" and not can_cache(model, self.config):
            return dataset
        cached = fill_cache(self.accelerator, dataset, model, self.config)
        assert isinstance(model, PipelineTrainingModule)
        model.prefix_cached = True
        kept = ("vae",) if self.previews else ()
        model.pipe.release(name for name in model.prefix.released_models if name not in kept)
        return cached

    def resume(self) -> None:
        """Continue from the newest complete state, where the options say so and there is one."""
        folder = find_state(self.files.output_path, self.config.resume)
        if folder is None:
            return
        state = load_state(folder)
        refuse_changed_options(state.options, self._fixed_options())
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state.weights[name])
        self.optimizer.load_state_dict(state.optimizer)
        self.lr_scheduler.load_state_dict(state.lr_scheduler)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.progress = state.progress
        logger.info("resumed from %s", folder)

    def save(self, epoch: int | None) -> None:
        """Write the weights, then the state, on the main process; the others wait."""
        if self.is_main:
            self.files.flush()
            self.files.save(self.model, step=self.progress.step, epoch=epoch)
            scaler = self.accelerator.scaler
            save_state(self.files.output_path / "state", TrainingState(
                self.progress, {name: p.detach() for name, p in self.parameters.items()},
                self.optimizer.state_dict(), self.lr_scheduler.state_dict(),
                scaler.state_dict() if scaler is not None else {}, self._fixed_options(),
            ))
            self.files.draw_curve()
        self.accelerator.wait_for_everyone()

    def draw_previews(self) -> None:
        if self.previews:
            with self.accelerator.autocast():
                self.previews.draw(self.progress.step)

    def _fixed_options(self) -> dict[str, Any]:
        options = {
            name: value for name, value in self.config.model_dump(mode="json").items()
            if name not in OPTIONS_THAT_MAY_CHANGE
        }
        if self.config.lr_scheduler in ("linear", "cosine"):
            options["steps of the learning-rate schedule"] = self.total_steps
        base_models = getattr(getattr(self.model, "pipe", None), "component_fingerprints", {})
        return {**options, "items per step": self.plan.step_size, "items of the data set": len(self.plan.buckets),
                "base models": dict(base_models)}


def _buckets(dataset: Any, step_size: int) -> Sequence[Any]:
    """Which items can share a forward pass. It must not depend on how a step is divided, or the windows would."""
    if step_size == 1 or not hasattr(dataset, "bucket"):
        return [None] * len(dataset)
    return [dataset.bucket(item) for item in range(len(dataset))]
