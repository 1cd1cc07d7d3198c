"""One training run as the loop sees it: what is set up before the first step, saving and previews."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import TrainConfig
from ..core.errors import UserError
from .bad_items import ExcludedList, excluded_in_options, share_left
from .cache_fill import cache_folder, can_cache, fill_cache
from .checkpoint import Progress, TrainingState, find_state, load_state, refuse_changed_options, save_state
from .disk_space import Footprint, check_space, saves_at_least
from .ema import WeightAverage
from .finite import FiniteGuard, Verdict
from .logger import CURVE_EVERY_S, ModelLogger, WeightFile
from .loss_report import StepReport
from .optim import build_lr_scheduler, build_optimizer, continue_lr_scheduler
from .patience import PatientBarrier
from .previews import Previews
from .saving import BackgroundWriter, HostCopies, values_replaced
from .schedule import RECIPE_VERSION
from .shipped import SavedFiles
from .spikes import SpikeDetector
from .state_check import check_form, check_shapes, taking_over
from .step_plan import Buckets, MicroBatch, RequestedItems, StepPlan
from .stopping import StopRequest
from .training_module import DiffusionTrainingModule, PipelineTrainingModule
from .validation import Validation, split_off

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

OPTIONS_THAT_MAY_CHANGE = frozenset((
    "output_path", "resume", "device", "dataset_num_workers", "num_epochs", "max_steps", "save_steps",
    "keep_checkpoints", "logger", "cache", "cache_path", "sample_prompts", "sample_every", "sample_steps",
    "sample_cfg_scale", "find_unused_parameters", "use_gradient_checkpointing", "use_gradient_checkpointing_offload",
    "dataset_base_path", "dataset_metadata_path", "model_paths", "tokenizer_path", "lora_format",
    "remove_prefix_in_ckpt", "checkpoint_names", "batch_size", "gradient_accumulation_steps", "max_bad_steps",
    "save_in_background", "max_minutes",
    "validation_every", "validation_timesteps", "keep_best", "on_bad_item", "loss_spike_factor",
))
"""Options that a resumed run may change, because they change what is written or how fast, not what is learned. Batch
size and accumulation may change against each other; their product is compared on its own."""

STEP_SIZE, SHARE = "items per step", "items per step of a process"
SCHEDULE_STEPS, SCHEDULE_ASKED_FOR = "steps of the learning-rate schedule", "num_epochs and max_steps"


class TrainingTask:
    """What the loop works with, set up in order, and what it asks for between steps."""

    def __init__(
        self, accelerator: Accelerator, dataset: Any, model: DiffusionTrainingModule, model_logger: ModelLogger,
        config: TrainConfig, stop: StopRequest | None = None,
    ) -> None:
        self.accelerator, self.model, self.files, self.config = accelerator, model, model_logger, config
        self.is_main = accelerator.is_main_process
        self.stop = stop or StopRequest(config.max_minutes)
        self.parameters = model.trainable_parameters()
        footprint = Footprint.of(model, config)
        check_space(model_logger.output_path, footprint, saves_at_least(config), config.keep_checkpoints)
        self._saved_step, self._saved_files = 0, SavedFiles()
        self._wait_for_pictures: PatientBarrier | None = None
        optimizer = build_optimizer(self.parameters.values(), config)
        self.previews = self._prepare_previews()
        self.excluded = ExcludedList(model_logger.output_path, dataset)
        whole = self._cache(dataset)
        dataset, held_out = split_off(whole, config.validation_split)
        self.validation = Validation(
            accelerator, model, whole, held_out, config.validation_timesteps, config.batch_size) if held_out else None
        reads_files = whole is self.excluded.dataset
        self.items = RequestedItems(
            dataset, config.seed, config.caption_dropout, skip_bad=reads_files and config.on_bad_item == "skip")
        self.left = 1.0
        """Share of the current step's items that could be loaded."""
        self.plan = StepPlan(
            Buckets(dataset),
            batch_size=config.batch_size, accumulation_steps=config.gradient_accumulation_steps,
            num_processes=accelerator.num_processes, rank=accelerator.process_index, seed=config.seed,
            steps_per_epoch=config.steps_per_epoch,
        )
        self.progress = Progress(step_size=self.plan.step_size)
        self.total_steps = self._count_steps()
        check_space(model_logger.output_path, footprint, self._count_saves(), config.keep_checkpoints)
        self.lr_scheduler = build_lr_scheduler(optimizer, config, self.total_steps)
        # frozen weights are read by every process from its own files: sending them costs time, and fails where the
        # processes hold different ones (the VAE of the previews) or ones that cannot be sent (float8)
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        model._ddp_params_and_buffers_to_ignore = [*frozen, *(name for name, _ in model.named_buffers())]  # type: ignore[assignment]
        self.network, self.optimizer = accelerator.prepare(model, optimizer)
        self.ema = WeightAverage(self.parameters, config.ema_decay) if config.ema_decay else None
        self.writer = BackgroundWriter(config.save_in_background)
        self._copies = HostCopies()
        self.guard = FiniteGuard(
            config.max_bad_steps, SpikeDetector(config.loss_spike_factor), config.on_loss_spike == "rollback")
        self.monitors: dict[str, Any] = {"numbers": self.guard}
        """What a saved state keeps besides weights and optimizer, by name."""
        if self.validation:
            self.monitors["validation"] = self.validation

    def _prepare_previews(self) -> Previews | None:
        config = self.config
        if not (config.sample_prompts and isinstance(self.model, PipelineTrainingModule)):
            return None
        self._wait_for_pictures = PatientBarrier(self.accelerator)
        if not self.is_main:
            return None
        cache = None if config.cache == "off" else cache_folder(config)
        return Previews(self.model, config, self.files.output_path, cache)

    def _cache(self, dataset: Any) -> Any:
        """Encode the frozen prefix once, then let go of the models that only it needs."""
        model = self.model
        if self.config.task == "sft" and not can_cache(model, self.config):
            return dataset
        cached = fill_cache(self.accelerator, dataset, model, self.config, self.stop.raise_if_requested)
        assert isinstance(model, PipelineTrainingModule)
        model.prefix_cached = True
        model.pipe.release(model.prefix.released_models)
        return cached

    def _count_steps(self) -> int:
        total = self.plan.total_steps(self.progress, self.config.num_epochs)
        return min(total, self.config.max_steps or total)

    def _count_saves(self) -> int:
        every = self.config.save_steps or self.plan.steps_per_epoch
        return max(1, -(-(self.total_steps - self.progress.step) // every))

    def resume(self) -> None:
        """Continue from the newest complete state, where the options say so and there is one."""
        folder = find_state(self.files.output_path, self.config.resume)
        if folder is None:
            return
        state = load_state(folder)
        with taking_over(folder):
            self._resume_position(state)
            self._refuse_another_run(state)
            self._take_weights(state)
            check_form("lr_scheduler", state.lr_scheduler, self.lr_scheduler.state_dict())
            continue_lr_scheduler(self.lr_scheduler, state.lr_scheduler, self.total_steps)
            for name, monitor in self.monitors.items():
                if name in state.monitors:
                    check_form(name, state.monitors[name], monitor.state_dict())
                    monitor.load_state_dict(state.monitors[name])
        logger.info("resumed from %s", folder)

    def _resume_position(self, state: TrainingState) -> None:
        """Take up the place in the data; with another number of processes the rest of the epoch is planned anew."""
        progress = self.progress = state.progress
        before, now = progress.step_size or state.options[STEP_SIZE], self.plan.step_size
        progress.step_size = now
        steps_of_part = progress.step_in_epoch - sum(steps for _, steps in progress.parts)
        if before != now and steps_of_part:
            progress.parts.append((before, steps_of_part))
        self.plan.continue_epoch(progress.epoch, progress.parts)
        self.total_steps = self._count_steps()
        if before != now:
            logger.info("a step now has %d items instead of %d: the run has %d steps in all, and its learning rate "
                        "follows that", now, before, self.total_steps)

    def _refuse_another_run(self, state: TrainingState) -> None:
        saved, now = dict(state.options), self._fixed_options()
        same_steps = saved.get(STEP_SIZE) == now[STEP_SIZE]
        # the same items in each step, or the same work for each of another number of processes
        if same_steps or saved.get(SHARE) == now[SHARE]:
            unequal = (SHARE, SCHEDULE_ASKED_FOR) if same_steps else (STEP_SIZE, SCHEDULE_STEPS)
            for options in (saved, now):
                for name in unequal:
                    options.pop(name, None)
        refuse_changed_options(saved, now)

    def save(self, epoch: int | None) -> None:
        """Copy what a save holds to host memory, on the main process, and have it written: weights, then state."""
        if not self.is_main:
            return
        # one save at a time is in memory; and no state is ever newer than the metrics on the disk
        self.writer.wait()
        self.files.flush()
        copies = self._copies = HostCopies(self.writer.in_background, self._copies)
        state = self._state(copies)
        copies.arrive()
        files = self._weight_files(epoch, state, copies)
        copies.arrive()
        self.writer.submit(functools.partial(self._write, files, state))

    def _state(self, copies: HostCopies) -> TrainingState:
        scaler, ema = self.accelerator.scaler, self.ema
        return TrainingState(
            progress=copy.deepcopy(self.progress),
            weights={name: copies.of(parameter) for name, parameter in self.parameters.items()},
            optimizer=copies.of_tree(self.optimizer.state_dict()),
            lr_scheduler=copy.deepcopy(self.lr_scheduler.state_dict()),
            scaler=scaler.state_dict() if scaler is not None else {},
            options=self._fixed_options(),
            config=self.config.model_dump(mode="json"),
            ema={name: copies.of(average) for name, average in ema.weights.items()} if ema else {},
            ema_updates=ema.num_updates if ema else 0,
            monitors={name: copy.deepcopy(monitor.state_dict()) for name, monitor in self.monitors.items()},
        )

    def _weight_files(self, epoch: int | None, state: TrainingState, copies: HostCopies) -> list[WeightFile]:
        """The trained weights, and the averaged ones beside them, as the model names them in files."""
        files: list[WeightFile] = []
        for values, suffix in ((state.weights, ""), (state.ema, "-ema")):
            if values:
                with values_replaced(self.parameters, values):
                    files += self.files.weight_files(
                        self.model, copies, step=self.progress.step, epoch=epoch, suffix=suffix)
            if not suffix:
                self._note_saved([file.path for file in files])
        return files

    def _write(self, files: Sequence[WeightFile], state: TrainingState) -> None:
        """What the writer does, off the training thread; old files go when everything new is complete."""
        self.files.write(files)
        save_state(self.files.output_path / "state", state)
        self.files.remove_old()
        self.files.draw_curve(CURVE_EVERY_S)

    def finish_writing(self) -> None:
        """Wait, all processes together, until everything is on the disk."""
        self.writer.wait()
        if self.is_main:
            self.files.flush()
            self.files.draw_curve()
        self.accelerator.wait_for_everyone()

    def note_lost(self, micro_batches: list[MicroBatch]) -> float:
        """List the items of a step that cannot be loaded any more; what to divide the weights of the others by."""
        if not self.items.skip_bad:
            return 1.0
        self.excluded.add_lost(micro_batches, self.progress.step + 1)
        self.left = share_left(self.accelerator, micro_batches)
        return self.left or 1.0

    def judge(
        self, window: list[int], micro_batches: list[MicroBatch], loss: torch.Tensor, grad_norm: torch.Tensor,
        seen: StepReport,
    ) -> Verdict:
        """Whether the step may reach the weights, and whether the run is to end; agreed by all processes."""
        stop = self.stop.reason() is not None
        verdict = self.guard.judge(self, window, micro_batches, loss, grad_norm, seen, stop)
        return verdict if self.left else dataclasses.replace(verdict, finite=False, left_out=True)

    def validate(self, later: bool = False) -> None:
        """Compute the held-out loss, all processes together, and log it; or note that a resumed run has to."""
        if self.validation is None:
            return
        self.validation.is_due = later
        if later:
            return
        row = self.validation.run(self.progress.step)
        if self.is_main:
            self.files.log(row)
            if self.config.keep_best and "best" in row:
                self._save_best()

    def _save_best(self) -> None:
        self.writer.wait()
        copies = HostCopies(self.writer.in_background)
        weights = {name: copies.of(parameter) for name, parameter in self.parameters.items()}
        copies.arrive()
        with values_replaced(self.parameters, weights):
            files = self.files.weight_files(self.model, copies, step=self.progress.step, epoch=None, name="best")
        copies.arrive()
        self.writer.submit(functools.partial(self.files.write_apart, files))

    def roll_back(self) -> int | None:
        """Put the last saved weights and optimizer in place again; their step, or None where nothing is saved yet."""
        self.finish_writing()
        folder = find_state(self.files.output_path, "auto")
        if folder is None:
            return None
        state = load_state(folder)
        self._take_weights(state)
        return state.progress.step

    def _take_weights(self, state: TrainingState) -> None:
        """Put back the weights, the optimizer, the loss scale and the average of a state."""
        if other := sorted(set(state.weights) ^ set(self.parameters)):
            raise UserError(f"the state holds other weights than those that are trained ({other[0]} is only in one of "
                            "them); it belongs to another run.")
        check_shapes("weights", state.weights, self.parameters)
        check_form("optimizer", state.optimizer["param_groups"], self.optimizer.state_dict()["param_groups"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state.weights[name])
        self.optimizer.load_state_dict(state.optimizer)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        if self.ema is not None:
            check_shapes("average", state.ema, self.ema.weights)
            self.ema.restore(state.ema, state.ema_updates)

    def draw_previews(self) -> None:
        """Draw the sample pictures from the files of this step on the main process; the others wait."""
        if self.previews:
            self.writer.wait()  # what goes wrong there is no matter of the pictures
            self.previews.draw(self.progress.step, self._files_of_this_step)
        if self._wait_for_pictures:
            self._wait_for_pictures()

    def _files_of_this_step(self) -> SavedFiles:
        """Saved now where no save was due; before the first step there is nothing to save."""
        if self.progress.step and self._saved_step != self.progress.step:
            files = self.files.weight_files(
                self.model, HostCopies(enabled=False), step=self.progress.step, epoch=None)
            self.files.write(files)
            self._note_saved([file.path for file in files])
        return self._saved_files

    def _note_saved(self, written: Sequence[Path]) -> None:
        self._saved_step, self._saved_files = self.progress.step, SavedFiles.of(self.model, written)

    def _fixed_options(self) -> dict[str, Any]:
        options = {
            name: value for name, value in self.config.model_dump(mode="json").items()
            if name not in OPTIONS_THAT_MAY_CHANGE
        }
        if self.config.lr_scheduler in ("linear", "cosine"):
            options[SCHEDULE_STEPS] = self.total_steps
            options[SCHEDULE_ASKED_FOR] = [self.config.num_epochs, self.config.max_steps]
        if self.config.on_loss_spike == "rollback":
            # what a spike is, and what is saved, decide where it leads back to
            options |= {"save_steps": self.config.save_steps, "loss_spike_factor": self.config.loss_spike_factor}
        base_models = getattr(getattr(self.model, "pipe", None), "component_fingerprints", {})
        return {
            **options, STEP_SIZE: self.plan.step_size,
            SHARE: self.config.batch_size * self.config.gradient_accumulation_steps,
            "items of the data set": len(self.plan.buckets), "base models": dict(base_models),
            "recipe version": RECIPE_VERSION,
            **excluded_in_options(self.excluded.dataset),
        }
