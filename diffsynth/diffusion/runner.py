"""The training loop."""

from __future__ import annotations

import math
import signal
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..config import TrainConfig
from ..core import random
from ..core.errors import StoppedEarly, UserError
from .bad_items import agree_on_excluded
from .cache_fill import fill_cache
from .checkpoint import check_output_folder, remove_leftovers, set_newer_aside
from .finite import Verdict, raise_if_hopeless
from .logger import ModelLogger
from .loss_report import report_batch, watch_losses
from .progress import progress_bar
from .run_plan import announce, plan_run
from .step_plan import MicroBatch, load_windows
from .stopping import StopRequest
from .task import TrainingTask
from .training_module import DiffusionTrainingModule, PipelineTrainingModule

if TYPE_CHECKING:
    from accelerate import Accelerator

OPTIONS_OF_THE_LOOP = frozenset((
    "learning_rate", "num_epochs", "max_steps", "steps_per_epoch", "batch_size", "seed", "optimizer", "optimizer_args",
    "weight_decay", "lr_scheduler", "lr_warmup_steps", "save_steps", "resume", "gradient_accumulation_steps",
    "max_grad_norm", "dataset_num_workers", "output_path", "caption_dropout", "ema_decay", "max_minutes",
    "save_in_background", "max_bad_steps", "loss_spike_factor",
    "on_loss_spike", "validation_split", "validation_every", "validation_timesteps", "keep_best", "on_bad_item",
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
        StoppedEarly: SIGTERM, Ctrl-C or ``max_minutes`` ended the run; its state is saved.
    """
    _refuse_ignored_options(model, options)
    config = (config or TrainConfig()).replace(output_path=str(model_logger.output_path), **options)
    stop = StopRequest(config.max_minutes)
    with stop.listening(signal.SIGTERM):
        _launch(accelerator, dataset, model, model_logger, config, stop)


def _launch(
    accelerator: Accelerator, dataset: Any, model: DiffusionTrainingModule, model_logger: ModelLogger,
    config: TrainConfig, stop: StopRequest,
) -> None:
    if accelerator.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        raise UserError(f"launching with {accelerator.distributed_type.value} is not supported yet; use accelerate "
                        "launch with --multi_gpu, or one process.")
    agree_on_excluded(accelerator, dataset, config)
    if config.task == "sft:data_process":
        fill_cache(accelerator, dataset, model, config, stop.raise_if_requested)
        return
    check_output_folder(model_logger.output_path, config.resume)
    # no process may write before the others have looked
    accelerator.wait_for_everyone()
    model_logger.check_format(model)
    task = TrainingTask(accelerator, dataset, model, model_logger, config, stop)
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
        stack.enter_context(dtypes_left_to_autocast(task.accelerator, task.model, task.config))
        stack.enter_context(task.stop.listening(signal.SIGINT))
        if task.is_main:
            remove_leftovers(task.files.output_path)
            if task.config.resume not in ("never", "auto"):
                set_newer_aside(task.files.output_path, task.progress.step)
            task.files.start(task.config, task.progress.step)
            task.excluded.start(resumed=task.progress.step > 0)
            announce(plan_run(task), task.files.output_path)
            stack.callback(task.files.close)
        stack.enter_context(task.writer)
        if task.progress.step == 0:
            task.draw_previews()
        if task.validation is not None and task.validation.is_due:
            task.validate()
        bar = stack.enter_context(progress_bar(task.is_main))
        bar_task = bar.add_task("training", total=task.total_steps, completed=task.progress.step, loss="")
        train(task, lambda loss: bar.update(bar_task, completed=task.progress.step, loss=f"loss {loss:.4f}"))
        task.finish_writing()


def dtypes_left_to_autocast(
    accelerator: Accelerator, model: DiffusionTrainingModule, config: TrainConfig
) -> AbstractContextManager[Any]:
    """While autocast sees to the dtypes: peft's own cast would keep a copy of the input for every layer."""
    if accelerator.mixed_precision == "no" or not model.lora_models or config.lora_dora:
        return nullcontext()
    from peft.helpers import disable_input_dtype_casting

    return disable_input_dtype_casting(model)


def train(task: TrainingTask, report: Any) -> None:
    """The loop: loss, backward, check, clip, step, schedule, log, save, preview."""
    progress, config, plan = task.progress, task.config, task.plan
    while progress.step < task.total_steps:
        windows = load_windows(
            task.items, plan, progress.epoch, progress.step_in_epoch, task.model.collate, config.dataset_num_workers
        )
        for window, micro_batches in windows:
            with watch_losses() as seen:
                loss = accumulate_gradients(task, micro_batches)
            grad_norm = clip_gradients(task)
            verdict = task.judge(window, micro_batches, loss, grad_norm, seen)
            learning_rate = task.lr_scheduler.get_last_lr()[0]
            apply_gradients(task, verdict)
            task.writer.check()
            task.lr_scheduler.step()
            progress.step += 1
            progress.step_in_epoch += 1
            if task.is_main:
                task.files.log(dict(
                    step=progress.step, epoch=progress.epoch, lr=learning_rate,
                    items=round(len(window) * task.left), **verdict.row()))
            raise_if_hopeless(verdict)
            report(verdict.loss)
            ended = progress.step_in_epoch == plan.steps_in(progress.epoch)
            epoch_that_ended = progress.epoch if ended else None
            if ended:
                progress.start_next_epoch()
            finished = progress.step == task.total_steps
            saves = _is_due(progress.step, config.save_steps) if config.save_steps else ended
            validates = _is_due(progress.step, config.validation_every) if config.validation_every else saves
            if validates or finished:
                task.validate(later=verdict.stop and not finished)
            if saves or finished or verdict.stop:
                task.save(epoch_that_ended if config.save_steps is None else None)
            draws = _is_due(progress.step, config.sample_every) if config.sample_every else saves
            if (draws and not verdict.stop) or finished:
                task.draw_previews()
            if finished:
                return
            if verdict.stop:
                stop_early(task)


def stop_early(task: TrainingTask) -> None:
    """End the run where it is, with everything on the disk.

    Raises:
        StoppedEarly: always.
    """
    task.finish_writing()
    raise StoppedEarly(f"stopped on request ({task.stop.reason() or 'of another process'}) after step "
                       f"{task.progress.step} of {task.total_steps}; the state is saved, continue with --resume auto.")


def _is_due(step: int, every: int) -> bool:
    return step % every == 0


def accumulate_gradients(task: TrainingTask, micro_batches: list[MicroBatch]) -> torch.Tensor:
    """Sum the gradients of a window, weighted by items, and return this process's part of its mean loss."""
    accelerator, config = task.accelerator, task.config
    total = torch.zeros((), device=accelerator.device)
    left = task.note_lost(micro_batches)
    for index, batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(task.network):
            items = batch.items or [0]
            with random.keyed_items(config.seed, task.progress.epoch, items):
                loss = task.network(batch.data)
            report_batch(loss)
            # DDP averages over processes, so that every process counts num_processes fold
            _backward(accelerator, loss * (batch.weight / left * accelerator.num_processes))
        total = total + loss.detach().float() * (batch.weight / left)
    return total


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


def apply_gradients(task: TrainingTask, verdict: Verdict) -> None:
    """Take the optimizer step, or leave it out and let go of the gradients."""
    if not verdict.left_out:
        task.optimizer.step()
        if task.ema is not None and not task.optimizer.step_was_skipped:
            task.ema.update()
    elif task.accelerator.scaler is not None:
        # without an optimizer step nothing else would tell the scaler that this step is over
        task.accelerator.scaler.update()
    task.optimizer.zero_grad()
