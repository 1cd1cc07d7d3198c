"""Whether what a run will write fits on the disk, asked before hours of training."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import TrainConfig
from ..core.errors import UserError
from .training_module import DiffusionTrainingModule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Footprint:
    """Sizes of what a run writes, in bytes."""

    state: int
    """One training state: the old one goes only after the new one verifies, so that there are two."""
    weights: int
    """The weight files of one save."""

    @classmethod
    def of(cls, model: DiffusionTrainingModule, config: TrainConfig) -> Footprint:
        """Estimated from the parameters; the optimizer is taken to keep two values for each, as Adam does."""
        parameters = list(model.trainable_parameters().values())
        trained = sum(parameter.nbytes for parameter in parameters)
        averaged = sum(4 * parameter.numel() for parameter in parameters) if config.ema_decay else 0
        saved = 0
        for name, parameter in model.trainable_parameters().items():
            is_full = any(name.startswith(f"pipe.{component}.") for component in model.full_models)
            saved += parameter.numel() * (_saved_itemsize(model) if is_full else 4)
        return cls(state=3 * trained + averaged, weights=saved * (2 if config.ema_decay else 1))

    def needed(self, num_saves: int, keep: int | None) -> int:
        """Most bytes that lie on the disk at once within the first ``num_saves`` saves."""
        weight_files = num_saves if keep is None else min(num_saves, keep + 1)
        return min(2, num_saves) * self.state + weight_files * self.weights


def _saved_itemsize(model: DiffusionTrainingModule) -> int:
    dtype = getattr(getattr(model, "pipe", None), "torch_dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4


def check_space(output_path: Path, footprint: Footprint, num_saves: int, keep: int | None) -> None:
    """Refuse a run whose first saves, at most two, do not fit, and warn of one whose last do not.

    Raises:
        UserError: the disk is too full, with the sizes.
    """
    existing = next(path for path in (output_path, *output_path.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free + _already_there(output_path)
    first = min(2, num_saves)
    if footprint.needed(first, keep) > free:
        raise UserError(
            f"output_path {output_path}: {_size(free)} are free there, and the first {first} saves need about "
            f"{_size(footprint.needed(first, keep))} (training state {_size(footprint.state)}, weights "
            f"{_size(footprint.weights)} each); "
            "free some space or choose another disk.")
    all_saves = footprint.needed(num_saves, keep)
    if all_saves > free:
        logger.warning(
            "%s: %s are free there, and the %d saves of this run need about %s; set keep_checkpoints or a larger "
            "save_steps.", output_path, _size(free), num_saves, _size(all_saves))


def saves_at_least(config: TrainConfig) -> int:
    """1 or 2: what the options say of the number of saves before the data are known."""
    if config.save_steps is None:
        return 1 if config.num_epochs == 1 else 2
    return 1 if config.max_steps is not None and config.max_steps <= config.save_steps else 2


def _already_there(output_path: Path) -> int:
    """Size of the states and weights of the run that is continued, which later ones take the place of."""
    patterns = ("state/step-*/*", "step-*.safetensors", "epoch-*.safetensors", "checkpoints/*.ckpt")
    return sum(path.stat().st_size for pattern in patterns for path in output_path.glob(pattern))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
