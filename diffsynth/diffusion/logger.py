"""What a run writes for people and programs: weights, metrics, configuration, curve."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError
from ..core.loader import save_safetensors, save_torch_file

if TYPE_CHECKING:
    from ..config import TrainConfig
    from .training_module import DiffusionTrainingModule

logger = logging.getLogger(__name__)

FLUSH_EVERY_S = 5.0
"""How long metrics may wait for a few more before they are written."""


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
        self._flushed_at = time.monotonic()

    @property
    def metrics_path(self) -> Path:
        return self.output_path / "metrics.jsonl"

    def start(self, config: TrainConfig, first_step: int) -> None:
        """Make the folder, write the resolved configuration, and forget metrics of steps that will be done again."""
        self.output_path.mkdir(parents=True, exist_ok=True)
        (self.output_path / "config.yaml").write_text(config.resolved_yaml(), encoding="utf-8")
        # files of the run that is continued count among those to keep
        self._saved = self._earlier_saves() if first_step else []
        kept = [row for row in self.read_metrics() if row["step"] <= first_step] if first_step else []
        partial = self.metrics_path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        partial.replace(self.metrics_path)
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
            saves.setdefault(path.stem.removesuffix("-lora"), []).append(path)
        return sorted(saves.values(), key=lambda files: files[0].stat().st_mtime_ns)

    def log(self, row: dict[str, Any]) -> None:
        """Take one row of metrics; it is in the file within a few seconds, or after ``flush``."""
        self._pending.append(row)
        if time.monotonic() - self._flushed_at > FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Append the kept rows to ``metrics.jsonl``."""
        if not self._pending:
            return
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self._pending)
            file.flush()
            os.fsync(file.fileno())
        if self._tensorboard is not None:
            for row in self._pending:
                for name in ("loss", "lr", "grad_norm"):
                    if row[name] is None:
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

    def save(self, model: DiffusionTrainingModule, *, step: int, epoch: int | None) -> list[Path]:
        """Write the trained weights.

        Args:
            model: Training module.
            step: Optimizer steps done.
            epoch: Index of the epoch that just ended, None for a save in between.
        Returns:
            The files written.
        Raises:
            UserError: the disk is full, or the file does not read back as what was trained; older files stay.
        """
        stem = f"step-{step}" if epoch is None else f"epoch-{epoch}"
        path = self.output_path / f"{stem}.safetensors"
        if self.names == "older":
            path = self.output_path / "checkpoints" / f"epoch={epoch or 0}-step={step}.ckpt"
        path.parent.mkdir(parents=True, exist_ok=True)
        written = []
        if model.full_models:
            written.append(self._save_full(model, path))
        if model.lora_models:
            written.append(self._save_lora(model, path.with_stem(path.stem + "-lora") if written else path))
        self._saved = [old for old in self._saved if old != written] + [written]
        while self.keep_checkpoints and len(self._saved) > self.keep_checkpoints:
            for old in self._saved.pop(0):
                old.unlink(missing_ok=True)
        return written

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

    def _save_lora(self, model: DiffusionTrainingModule, path: Path) -> Path:
        from ..adapters.lora import save_lora

        files = [path for name in model.lora_models for path in model.pipe.component_paths.get(name, ())]
        base = ", ".join(file.name for file in files)
        save_lora(path, model.export_lora(), model.pipe.family(), self._format(), base=base,
                  options=model.lora_options)
        return path

    def _save_full(self, model: DiffusionTrainingModule, path: Path) -> Path:
        tensors = model.export_full_models()
        prefix = self.remove_prefix_in_ckpt
        if prefix is None and len(model.full_models) == 1:
            # with one model there is only one name under which anything can load it
            prefix = f"pipe.{model.full_models[0]}."
        dtype = model.pipe.torch_dtype
        named = {
            name.removeprefix(prefix or ""): tensor.detach().to(
                "cpu", dtype if tensor.is_floating_point() else None, copy=True)
            for name, tensor in tensors.items()
        }
        config = getattr(getattr(model.pipe, model.full_models[0]), "config", None)
        metadata = {"format": "pt"}
        if len(model.full_models) == 1 and config is not None:
            metadata["config"] = json.dumps(dict(config) if not hasattr(config, "to_dict") else config.to_dict())
        return save_torch_file(path, named) if path.suffix == ".ckpt" else save_safetensors(path, named, metadata)

    def draw_curve(self) -> Path | None:
        """Draw ``loss_curve.png`` from the metrics; None when there are none."""
        rows = self.read_metrics()
        if not rows:
            return None
        import matplotlib
        from matplotlib.figure import Figure

        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        with matplotlib.rc_context({"font.size": 9}):
            figure = Figure(figsize=(7, 4), layout="constrained")
            axes = figure.subplots()
            axes.plot(steps, losses, color="#b8c4d6", linewidth=0.8, label="loss")
            axes.plot(steps, _smooth(losses), color="#1f4e9c", linewidth=1.8, label="smoothed")
            axes.set(xlabel="optimizer step", ylabel="loss", title=self.output_path.name)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        path = self.output_path / "loss_curve.png"
        partial = path.with_name(".loss_curve.partial.png")
        figure.savefig(partial, dpi=120)
        partial.replace(path)
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
