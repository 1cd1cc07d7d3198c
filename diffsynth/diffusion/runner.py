"""The training loop."""

from __future__ import annotations

import math
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..config import TrainConfig
from ..core import random
from ..core.errors import RunStopped, UserError
from .cache_fill import fill_cache
from .checkpoint import check_output_folder
from .logger import ModelLogger
from .progress import progress_bar
from .step_plan import MicroBatch, load_windows
from .task import TrainingTask
from .training_module import DiffusionTrainingModule, PipelineTrainingModule

if TYPE_CHECKING:
    from accelerate import Accelerator

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
    task = TrainingTask(accelerator, dataset, model, model_logger, config)
    task.resume()
    run(task)


def _refuse_ignored_options(model: Any, options: dict[str, Any]) -> None:
    """A module of one's own decides by itself what the schema's other options would mean."""
    ignored = [] if isinstance(model, PipelineTrainingModule) else sorted(set(options) - OPTIONS_OF_THE_LOOP)
    for name in ignored:
        if name in TrainConfig.model_fields:
            raise UserError(f"{name} has no effect on {type(model).__name__}; set it where the module, the data set or "
                            "the ModelLogger is built.")


def run(task: TrainingTask) -> None:
    """Train to the end, with everything open that the loop writes to."""
    with ExitStack() as stack:
        if task.accelerator.mixed_precision != "no" and task.model.lora_models and not task.config.lora_dora:
            from peft.helpers import disable_input_dtype_casting

            # autocast sees to the dtypes; peft's own cast would keep a copy of the input for every layer
            stack.enter_context(disable_input_dtype_casting(task.model))
        if task.is_main:
            task.files.start(task.config, task.progress.step)
            stack.callback(task.files.close)
        if task.previews and task.progress.step == 0:
            task.draw_previews()
        bar = stack.enter_context(progress_bar(task.is_main))
        bar_task = bar.add_task("training", total=task.total_steps, completed=task.progress.step, loss="")
        train(task, lambda loss: bar.update(bar_task, completed=task.progress.step, loss=f"loss {loss:.4f}"))
        if task.is_main:
            task.files.flush()
            task.files.draw_curve()


def train(task: TrainingTask, report: Any) -> None:
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


def accumulate_gradients(task: TrainingTask, micro_batches: list[MicroBatch]) -> torch.Tensor:
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


def clip_gradients(task: TrainingTask) -> torch.Tensor:
    """Clip the gradients to ``max_grad_norm`` (0: never) and return their norm before, float32."""
    accelerator = task.accelerator
    if accelerator.scaler is not None:
        accelerator.unscale_gradients(task.optimizer)
    limit = task.config.max_grad_norm or math.inf
    return torch.nn.utils.clip_grad_norm_(task.parameters.values(), limit)


def stop_unless_finite(task: TrainingTask, window: list[int], loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
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
