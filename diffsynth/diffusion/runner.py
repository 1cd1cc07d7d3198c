"""The training loop, and what is set up before it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import TrainConfig
from ..core import random
from ..core.errors import RunStopped, UserError
from ..core.loader import model_base_path
from .checkpoint import (
    Progress,
    TrainingState,
    check_output_folder,
    find_state,
    load_state,
    refuse_changed_options,
    save_state,
)
from .frozen_cache import CachedDataset, encode_job, plan_cache
from .logger import ModelLogger
from .optim import build_lr_scheduler, build_optimizer
from .previews import Previews
from .progress import progress_bar, track
from .step_plan import MicroBatch, RequestedItems, StepPlan, load_windows
from .training_module import DiffusionTrainingModule, PipelineTrainingModule

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .base_pipeline import BasePipeline

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


OPTIONS_OF_THE_LOOP = frozenset((
    "learning_rate", "num_epochs", "max_steps", "steps_per_epoch", "batch_size", "seed", "optimizer", "optimizer_args",
    "weight_decay", "lr_scheduler", "lr_warmup_steps", "save_steps", "resume", "gradient_accumulation_steps",
    "max_grad_norm", "dataset_num_workers", "output_path", "caption_dropout",
))
"""Options that mean the same for every module."""


def launch_training_task(
    accelerator: Accelerator,
    dataset: Any,
    model: DiffusionTrainingModule,
    model_logger: ModelLogger,
    config: TrainConfig | None = None,
    **options: Any,
) -> None:
    """Train ``model`` on ``dataset`` and write what comes out through ``model_logger``.

    Args:
        accelerator: Device, precision and processes.
        dataset: A ``UnifiedDataset``, or anything with a length and items.
        model: The module whose forward is a loss.
        model_logger: Where weights and metrics go.
        config: The run's options; default those of the schema.
        **options: Single options of the schema by name, on top of ``config``.
    Raises:
        UserError: an option is unknown or wrong, or the output folder holds another run.
        RunStopped: the loss or a gradient is not a finite number.
    """
    _refuse_ignored_options(model, options)
    if accelerator.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise UserError(f"launching with {accelerator.distributed_type.value} is not supported yet; use accelerate "
                        "launch with --multi_gpu, or one process.")
    config = (config or TrainConfig()).replace(output_path=str(model_logger.output_path), **options)
    if config.task == "sft:data_process":
        fill_cache(accelerator, dataset, model, config)
        return
    check_output_folder(model_logger.output_path, config.resume)
    # no process may write before the others have looked
    accelerator.wait_for_everyone()
    model_logger.check_format(model)
    task = _Task(accelerator, dataset, model, model_logger, config)
    task.resume()
    task.run()


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


def _refuse_ignored_options(model: Any, options: dict[str, Any]) -> None:
    """A module of one's own decides by itself what the schema's other options would mean."""
    ignored = [] if isinstance(model, PipelineTrainingModule) else sorted(set(options) - OPTIONS_OF_THE_LOOP)
    for name in ignored:
        if name in TrainConfig.model_fields:
            raise UserError(f"{name} has no effect on {type(model).__name__}; set it where the module, the data set or "
                            "the ModelLogger is built.")


class _Task:
    """One training run: what the loop works with, set up in order."""

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
        if self.config.task == "sft" and not _can_cache(model, self.config):
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

    def run(self) -> None:
        """Train to the end."""
        with ExitStack() as stack:
            if self.accelerator.mixed_precision != "no" and self.model.lora_models and not self.config.lora_dora:
                from peft.helpers import disable_input_dtype_casting

                # autocast sees to the dtypes; peft's own cast would keep a copy of the input for every layer
                stack.enter_context(disable_input_dtype_casting(self.model))
            if self.is_main:
                self.files.start(self.config, self.progress.step)
                stack.callback(self.files.close)
            if self.previews and self.progress.step == 0:
                self.draw_previews()
            bar = stack.enter_context(progress_bar(self.is_main))
            bar_task = bar.add_task("training", total=self.total_steps, completed=self.progress.step, loss="")
            train(self, lambda loss: bar.update(bar_task, completed=self.progress.step, loss=f"loss {loss:.4f}"))
            if self.is_main:
                self.files.flush()
                self.files.draw_curve()

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


def _can_cache(model: Any, config: TrainConfig) -> bool:
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
    if not _can_cache(model, config):
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


def train(task: _Task, report: Any) -> None:
    """The loop: loss, backward, check, clip, step, schedule, log, save, preview."""
    progress, config, plan = task.progress, task.config, task.plan
    while progress.step < task.total_steps:
        windows = load_windows(
            task.items, plan, progress.epoch, progress.step_in_epoch, task.model.collate, config.dataset_num_workers
        )
        for window, micro_batches in windows:
            loss = accumulate_gradients(task, micro_batches)
            grad_norm = clip_gradients(task)
            stop_unless_finite(task, window, loss, grad_norm)
            learning_rate = task.lr_scheduler.get_last_lr()[0]
            task.optimizer.step()
            if not task.optimizer.step_was_skipped:
                task.lr_scheduler.step()
            task.optimizer.zero_grad()
            progress.step += 1
            progress.step_in_epoch += 1
            row = dict(step=progress.step, epoch=progress.epoch, loss=loss.item(), lr=learning_rate,
                       grad_norm=grad_norm.item() if torch.isfinite(grad_norm) else None, items=len(window))
            if task.is_main:
                task.files.log(row)
            report(row["loss"])
            ended = progress.step_in_epoch == plan.steps_per_epoch
            epoch_that_ended = progress.epoch if ended else None
            if ended:
                progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
            finished = progress.step == task.total_steps
            saves = _is_due(progress.step, config.save_steps) if config.save_steps else ended
            if saves or finished:
                task.save(epoch_that_ended if config.save_steps is None else None)
            if (_is_due(progress.step, config.sample_every) if config.sample_every else saves) or finished:
                task.draw_previews()
            if finished:
                return


def _is_due(step: int, every: int) -> bool:
    return step % every == 0


def accumulate_gradients(task: _Task, micro_batches: list[MicroBatch]) -> torch.Tensor:
    """Sum the gradients of a window, weighted by items, and return its mean loss over all processes."""
    accelerator, config = task.accelerator, task.config
    total = torch.zeros((), device=accelerator.device)
    for index, batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(task.network):
            items = batch.items or [0]
            with random.keyed_items(config.seed, task.progress.epoch, items):
                loss = task.network(batch.data)
            # DDP averages over processes, so that every process counts num_processes fold
            _backward(accelerator, loss * (batch.weight * accelerator.num_processes))
        total = total + loss.detach().float() * batch.weight
    return accelerator.reduce(total, "sum")


def _backward(accelerator: Accelerator, loss: torch.Tensor) -> None:
    """Backward with the loss scale of fp16, and without accelerate's own division by the accumulation steps."""
    if accelerator.scaler is not None:
        accelerator.scaler.scale(loss).backward()
    else:
        loss.backward()


def clip_gradients(task: _Task) -> torch.Tensor:
    """Clip the gradients to ``max_grad_norm`` (0: never) and return their norm before, float32."""
    accelerator = task.accelerator
    if accelerator.scaler is not None:
        accelerator.unscale_gradients(task.optimizer)
    limit = task.config.max_grad_norm or math.inf
    return torch.nn.utils.clip_grad_norm_(task.parameters.values(), limit)


def stop_unless_finite(task: _Task, window: list[int], loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
    """Raise ``RunStopped`` before a number that is not finite reaches the weights."""
    scaler = task.accelerator.scaler
    # the scaler of fp16 answers an overflow with a smaller scale and skips the step, until there is none smaller
    may_overflow = scaler is not None and scaler.get_scale() > 1
    if not bool(torch.isfinite(loss) & (torch.isfinite(grad_norm) | may_overflow)):
        raise RunStopped(
            f"step {task.progress.step + 1}: loss {loss.item()}, gradient norm {grad_norm.item()} are not finite "
            f"numbers (items {window[:8]}); the weights were left as they were after step {task.progress.step}. "
            "Try a lower --learning_rate, or --mixed_precision no."
        )


def _buckets(dataset: Any, step_size: int) -> Sequence[Any]:
    """Which items can share a forward pass. It must not depend on how a step is divided, or the windows would."""
    if step_size == 1 or not hasattr(dataset, "bucket"):
        return [None] * len(dataset)
    return [dataset.bucket(item) for item in range(len(dataset))]
