"""What a run writes for people and programs: weights, metrics, configuration, curve."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import UserError
from ..core.loader import save_safetensors, save_torch_file
from ..core.loader.writer import replace_file
from .saving import HostCopies
from .schedule import RECIPE_VERSION

if TYPE_CHECKING:
    from ..adapters.lora import LoraState
    from ..config import TrainConfig
    from .training_module import DiffusionTrainingModule

logger = logging.getLogger(__name__)

CURVE_EVERY_S = 20.0
"""How long the picture of the loss may be old while the run goes on."""
FLUSH_EVERY_S = 5.0
"""How long metrics may wait for a few more before they are written."""


@dataclass(frozen=True)
class WeightFile:
    """A weight file that is still to be written, with values that training no longer changes."""

    path: Path
    model: DiffusionTrainingModule
    """Asked for names and configurations only."""
    lora: dict[str, LoraState]
    """Component -> adapter; empty for a file of whole models."""
    full: dict[str, torch.Tensor]


class ModelLogger:
    """Writes a run's files into its output folder.

    Args:
        output_path: Folder of the run.
        remove_prefix_in_ckpt: Prefix taken off the names in saved files, for example ``pipe.dit.``; a LoRA is then
            written with the bare module names of the pages.
        lora_format: ``auto``, ``diffsynth``, ``diffusers``, ``kohya`` or ``comfyui``.
        keep_checkpoints: Keep the newest this many weight files; None keeps all.
        names: ``newer``: ``step-N.safetensors`` and ``epoch-N.safetensors``; ``older``:
            ``checkpoints/epoch=E-step=S.ckpt``.
        tensorboard: Write TensorBoard events too.
    """

    def __init__(
        self,
        output_path: str | Path,
        remove_prefix_in_ckpt: str | None = None,
        lora_format: str = "auto",
        keep_checkpoints: int | None = None,
        names: str = "newer",
        tensorboard: bool = False,
    ) -> None:
        self.output_path = Path(output_path)
        self.remove_prefix_in_ckpt = remove_prefix_in_ckpt
        self.lora_format = lora_format
        self.keep_checkpoints = keep_checkpoints
        self.names = names
        self._tensorboard_wanted = tensorboard
        self._tensorboard: Any = None
        self._saved: list[list[Path]] = []
        """Files of each save, oldest first."""
        self._pending: list[dict[str, Any]] = []
        self._num_drawn, self._drawn_at = 0, -math.inf
        self._losses: dict[str, list[tuple[int, float]]] = {"loss": [], "validation_loss": []}
        """Points of the curves; the thread that draws it must not read a file that is being appended to."""
        self._flushed_at = time.monotonic()

    @property
    def metrics_path(self) -> Path:
        return self.output_path / "metrics.jsonl"

    def start(self, config: TrainConfig, first_step: int) -> None:
        """Make the folder, write the resolved configuration, and forget metrics of steps that will be done again."""
        self.output_path.mkdir(parents=True, exist_ok=True)
        with replace_file(self.output_path / "config.yaml") as file:
            file.write(config.resolved_yaml().encode("utf-8"))
        # files of the run that is continued count among those to keep
        self._saved = self._earlier_saves() if first_step else []
        kept = [row for row in self.read_metrics() if row["step"] <= first_step] if first_step else []
        with replace_file(self.metrics_path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept).encode("utf-8"))
        for row in kept:
            self._note_losses(row)
        if self._tensorboard_wanted:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("logger tensorboard needs the package tensorboard; pip install tensorboard.") from error
            self._tensorboard = SummaryWriter(str(self.output_path / "tensorboard"), purge_step=first_step or None)

    def _earlier_saves(self) -> list[list[Path]]:
        patterns = ("step-*.safetensors", "epoch-*.safetensors", "checkpoints/epoch=*.ckpt")
        saves: dict[str, list[Path]] = {}
        for path in sorted(path for pattern in patterns for path in self.output_path.glob(pattern)):
            saves.setdefault(path.stem.removesuffix("-lora").removesuffix("-ema"), []).append(path)
        return sorted(saves.values(), key=lambda files: files[0].stat().st_mtime_ns)

    def log(self, row: dict[str, Any]) -> None:
        """Take one row of metrics; it is in the file within a few seconds, or after ``flush``."""
        self._pending.append(row)
        self._note_losses(row)
        if time.monotonic() - self._flushed_at > FLUSH_EVERY_S:
            self.flush()

    def _note_losses(self, row: dict[str, Any]) -> None:
        for name, points in self._losses.items():
            if row.get(name) is not None:  # null: a step that was left out
                points.append((row["step"], row[name]))

    def flush(self) -> None:
        """Append the kept rows to ``metrics.jsonl``."""
        if not self._pending:
            return
        try:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in self._pending)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._pending.clear()
            raise UserError(f"cannot write {self.metrics_path}: {error.strerror or error}; free some space, then "
                            "continue with --resume auto.") from error
        if self._tensorboard is not None:
            for row in self._pending:
                for name in ("loss", "lr", "grad_norm", "validation_loss"):
                    if row.get(name) is None:
                        continue  # an overflow of fp16, whose step was skipped
                    self._tensorboard.add_scalar(name, row[name], row["step"])
            self._tensorboard.flush()
        self._pending.clear()
        self._flushed_at = time.monotonic()

    def read_metrics(self) -> list[dict[str, Any]]:
        """Rows of ``metrics.jsonl``; a last line that a crash cut short is left out."""
        if not self.metrics_path.exists():
            return []
        rows = []
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                logger.warning("%s: left out an incomplete line", self.metrics_path)
        return rows

    def weight_files(
        self, model: DiffusionTrainingModule, copies: HostCopies, *, step: int, epoch: int | None, suffix: str = "",
        name: str | None = None,
    ) -> list[WeightFile]:
        """The weight files of a save, with the values that the model's parameters hold now.

        Args:
            model: Training module.
            copies: For what a model holds besides its parameters.
            step: Optimizer steps done.
            epoch: Index of the epoch that just ended, None for a save in between.
            suffix: Added to the names, for example ``-ema``.
            name: A name of its own instead of one made of step and epoch, for example ``best``.
        """
        stem = name or (f"step-{step}" if epoch is None else f"epoch-{epoch}")
        path = self.output_path / f"{stem}{suffix}.safetensors"
        if self.names == "older":
            stem = name or f"epoch={epoch or 0}-step={step}"
            path = self.output_path / "checkpoints" / f"{stem}{suffix}.ckpt"
        files = []
        if model.full_models:
            own = {parameter.data_ptr() for parameter in model.parameters()}
            full = {name: tensor.detach() if tensor.data_ptr() in own else copies.of(tensor)
                    for name, tensor in model.export_full_models().items()}
            files.append(WeightFile(path, model, {}, full))
        if model.lora_models:
            beside = path.with_stem(path.stem + "-lora") if files else path
            files.append(WeightFile(beside, model, model.export_lora(), {}))
        return files

    def write_apart(self, files: Sequence[WeightFile]) -> None:
        """Write the weight files of one save, which is never removed.

        Raises:
            UserError: the disk is full, or a file does not read back as what was trained; older files stay.
        """
        for file in files:
            file.path.parent.mkdir(parents=True, exist_ok=True)
            if file.lora:
                self._write_lora(file)
            else:
                self._write_full(file)

    def write(self, files: Sequence[WeightFile]) -> None:
        """``write_apart``, and count the files among those to keep; ``remove_old`` makes room afterwards."""
        self.write_apart(files)
        written = [file.path for file in files]
        self._saved = [old for old in self._saved if not set(old) & set(written)] + [written]

    def remove_old(self) -> None:
        """Remove all but the newest saves that are to be kept."""
        while self.keep_checkpoints and len(self._saved) > self.keep_checkpoints:
            for old in self._saved.pop(0):
                old.unlink(missing_ok=True)

    def check_format(self, model: DiffusionTrainingModule) -> None:
        """Make sure, before hours of training, that what is trained can be written.

        Raises:
            UserError: a layer or a kind of LoRA has no place in the asked-for format.
        """
        from ..adapters.lora import check_format, lora_state

        for name in model.lora_models:
            layers = lora_state(getattr(model.pipe, name)).layers
            dora = any(layer.dora_scale is not None for layer in layers.values())
            check_format(model.pipe.family(), self._format(), name, layers, dora)

    def _format(self) -> str:
        # the pages remove the prefix to get the bare module names of this system
        return "diffsynth" if self.lora_format == "auto" and self.remove_prefix_in_ckpt else self.lora_format

    def _write_lora(self, file: WeightFile) -> None:
        from ..adapters.lora import save_lora

        model = file.model
        files = [path for name in model.lora_models for path in model.pipe.component_paths.get(name, ())]
        base = ", ".join(file.name for file in files)
        save_lora(file.path, file.lora, model.pipe.family(), self._format(), base=base, options=model.lora_options)

    def _write_full(self, file: WeightFile) -> None:
        model, prefix = file.model, self.remove_prefix_in_ckpt
        if prefix is None and len(model.full_models) == 1:
            # with one model there is only one name under which anything can load it
            prefix = f"pipe.{model.full_models[0]}."
        dtype = model.pipe.torch_dtype
        named = {
            name.removeprefix(prefix or ""): tensor.to("cpu", dtype if tensor.is_floating_point() else None)
            for name, tensor in file.full.items()
        }
        config = getattr(getattr(model.pipe, model.full_models[0]), "config", None)
        metadata = {"format": "pt", "recipe_version": str(RECIPE_VERSION)}
        if len(model.full_models) == 1 and config is not None:
            metadata["config"] = json.dumps(dict(config) if not hasattr(config, "to_dict") else config.to_dict())
        if file.path.suffix == ".ckpt":
            save_torch_file(file.path, named)
        else:
            save_safetensors(file.path, named, metadata)

    def draw_curve(self, at_most_every_s: float = 0.0) -> Path | None:
        """Draw ``loss_curve.png`` from the metrics; None when there is nothing new, or when it is too early."""
        points, held_out = list(self._losses["loss"]), list(self._losses["validation_loss"])
        num_points = len(points) + len(held_out)
        if num_points == self._num_drawn or time.monotonic() - self._drawn_at < at_most_every_s:
            return None
        self._num_drawn, self._drawn_at = num_points, time.monotonic()
        import matplotlib
        from matplotlib.figure import Figure

        steps, losses = [step for step, _ in points], [loss for _, loss in points]
        with matplotlib.rc_context({"font.size": 9}):
            figure = Figure(figsize=(7, 4), layout="constrained")
            axes = figure.subplots()
            axes.plot(steps, losses, color="#b8c4d6", linewidth=0.8, label="loss")
            axes.plot(steps, _smooth(losses), color="#1f4e9c", linewidth=1.8, label="smoothed")
            if held_out:
                axes.plot(*zip(*held_out, strict=True), color="#c8571b", linewidth=1.4, marker="o", markersize=3,
                          label="held out")
            axes.set(xlabel="optimizer step", ylabel="loss", title=self.output_path.name)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        path = self.output_path / "loss_curve.png"
        with replace_file(path) as file:
            figure.savefig(file, dpi=120, format="png")
        return path

    def close(self) -> None:
        self.flush()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _smooth(values: list[float], decay: float = 0.95) -> list[float]:
    """Exponential moving average without the pull of its start (Kingma and Ba, arXiv:1412.6980, section 3)."""
    smoothed, mean = [], 0.0
    for count, value in enumerate(values, 1):
        mean = decay * mean + (1 - decay) * value
        smoothed.append(mean / (1 - decay**count))
    return smoothed
