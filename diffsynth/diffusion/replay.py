"""Replay files: everything that one bad step of one process was made of, so that it can be run again elsewhere."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..core.errors import UserError
from ..core.loader import save_safetensors
from ..core.loader.reader import WeightReader
from .item_names import item_name
from .loss_report import StepReport
from .schedule import RECIPE_VERSION
from .state_check import check_form
from .step_plan import MicroBatch
from .training_module import PipelineTrainingModule

if TYPE_CHECKING:
    from .task import TrainingTask

logger = logging.getLogger(__name__)

VERSION = 1
KEPT_FILES = 4
"""Replay files of one process that are kept, the newest ones; each holds the trained weights."""
KEPT_BYTES = 8 * 2**30
"""What they may take together; the newest is kept even where it alone takes more."""
MAX_BATCHES = 4096


_FORM: dict[str, Any] = {
    "version": 1, "recipe_version": 1, "config": {}, "step": 1, "epoch": 0, "seed": 0, "window": [0], "rank": 0,
    "num_processes": 1, "loss": None, "grad_norm": None, "scale": 1.0, "cached": False, "base_models": {}, "torch": "",
    "device": "", "batches": [],
}
_FORM_OF_BATCH: dict[str, Any] = {
    "items": [0], "keys": [0], "names": [""], "weight": 1.0, "loss": None, "timesteps": [0.0], "data": {}}
"""What kind of value stands where; None stands for a number or a text."""


@dataclass(frozen=True)
class Replay:
    """What a replay file holds."""

    document: dict[str, Any]
    """Configuration, step, items and what was seen."""
    weights: dict[str, torch.Tensor]
    """Trained weights before the step, by parameter name."""
    batches: list[Any]
    """Data of each forward pass, as the module's forward takes it."""


def write_replay(
    task: TrainingTask, window: list[int], micro_batches: Sequence[MicroBatch], report: StepReport,
    chosen: Sequence[int], loss: float, grad_norm: float,
) -> Path | None:
    """Write ``replay/step-N.safetensors`` for some of this process's forward passes of the step that follows.

    Returns:
        The file; None when it cannot be written, or when the module is one of the user's own, which only their
        program can build again.
    """
    if not isinstance(task.model, PipelineTrainingModule):
        return None
    step, rank = task.progress.step + 1, task.accelerator.process_index
    tensors = {f"weights.{name}": parameter.detach() for name, parameter in task.parameters.items()}
    batches = []
    for number, index in enumerate(chosen):
        batch, forward = micro_batches[index], report.batches[index]
        items = batch.items or window[:1]
        batches.append({
            "items": items, "keys": batch.items or [0], "names": [item_name(task.items.dataset, i) for i in items],
            "weight": batch.weight, "loss": _number(forward.loss.item()),
            "timesteps": [t for seen in forward.reports for t in seen.timesteps.tolist()],
            "data": _encode(batch.data, tensors, f"batch.{number}"),
        })
    scaler = task.accelerator.scaler
    document = {
        "version": VERSION, "recipe_version": RECIPE_VERSION, "config": task.config.model_dump(mode="json"),
        "step": step, "epoch": task.progress.epoch, "seed": task.config.seed, "window": window, "rank": rank,
        "num_processes": task.accelerator.num_processes, "loss": _number(loss), "grad_norm": _number(grad_norm),
        "scale": scaler.get_scale() if scaler is not None else 1.0, "cached": task.model.prefix_cached,
        "base_models": dict(task.model.pipe.component_fingerprints), "torch": torch.__version__,
        "device": str(task.accelerator.device), "batches": batches,
    }
    folder = task.files.output_path / "replay"
    suffix = f"-rank-{rank}" if rank else ""
    size = sum(tensor.nbytes for tensor in tensors.values())
    if shutil.disk_usage(task.files.output_path).free < 3 * size:
        # the next save needs the room more
        logger.warning("no replay file of step %d: it would take %.1f GB of a nearly full disk", step, size / 1e9)
        return None
    try:
        path = save_safetensors(folder / f"step-{step}{suffix}.safetensors", tensors,
                                {"replay": json.dumps(document, allow_nan=False)})
    except UserError as error:
        # the step is left out all the same; only the means to look at it are missing
        logger.warning("no replay file of step %d: %s", step, error)
        return None
    _remove_oldest(folder, suffix)
    return path


def _remove_oldest(folder: Path, suffix: str) -> None:
    steps: dict[int, Path] = {}
    for path in folder.glob(f"step-*{suffix}.safetensors"):
        number = path.name.removeprefix("step-").removesuffix(f"{suffix}.safetensors")
        if number.isdigit():
            steps[int(number)] = path
    total = 0
    for age, step in enumerate(sorted(steps, reverse=True)):
        total += steps[step].stat().st_size
        if age >= KEPT_FILES or (age > 0 and total > KEPT_BYTES):
            steps[step].unlink()


def read_replay(path: Path) -> Replay:
    """Read a replay file.

    Raises:
        UserError: it is no such file, damaged, or of a newer version.
    """
    with WeightReader(path) as reader:
        try:
            document = json.loads(reader.metadata["replay"])
            version = document["version"]
            if version > VERSION:
                raise UserError(f"{path} was written by a newer version of diffsynth; replay it with that one.")
            weights = {key.removeprefix("weights."): reader.get(key)
                       for key in reader.tensors if key.startswith("weights.")}
            check_form("replay", {**document, "config": {}, "base_models": {}, "batches": []}, _FORM)
            for entry in document["batches"]:
                check_form("replay.batches", {**entry, "data": {}}, _FORM_OF_BATCH)
            if missing := _FORM.keys() - document.keys():
                raise KeyError(min(missing))
            batches = [_decode(entry["data"], reader) for entry in document["batches"][:MAX_BATCHES]]
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, StopIteration, RecursionError, OverflowError) as error:
            raise UserError(f"{path} is no replay file of diffsynth; name a file of a run's replay folder.") from error
    return Replay(document, weights, batches)


def _encode(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """A value of a batch as JSON; tensors and pictures go into ``tensors`` under a name that the JSON gives."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, Image.Image):
        tensors[name] = torch.from_numpy(np.array(value))
        return {"picture": name, "mode": value.mode}
    if isinstance(value, Mapping):
        return {"columns": {str(key): _encode(entry, tensors, f"{name}.{key}") for key, entry in value.items()}}
    if isinstance(value, list | tuple):
        return {"list": [_encode(entry, tensors, f"{name}.{index}") for index, entry in enumerate(value)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"text": str(value)}
    return {"value": value} if value is None or isinstance(value, bool | int | float | str) else {"text": str(value)}


def _decode(entry: dict[str, Any], reader: WeightReader) -> Any:
    kind = next(iter(entry))
    if kind == "tensor":
        return reader.get(entry["tensor"])
    if kind == "picture":
        picture = Image.fromarray(reader.get(entry["picture"]).numpy())
        return picture if picture.mode == entry["mode"] else picture.convert(entry["mode"])
    if kind == "columns":
        return {name: _decode(value, reader) for name, value in entry["columns"].items()}
    if kind == "list":
        return [_decode(value, reader) for value in entry["list"]]
    return entry[kind]


def _number(value: float) -> float | str:
    """JSON has no NaN: numbers that are not finite are told as text."""
    return value if math.isfinite(value) else str(value)
