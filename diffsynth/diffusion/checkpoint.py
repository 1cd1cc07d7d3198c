"""The state that an interrupted run continues from: complete and verified, or absent.

A state is a folder ``state/step-N`` with the trained weights and the optimizer as safetensors, everything else as
JSON, and a manifest with sizes and hashes that is written last. The folder gets its name in one rename.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..core.errors import UserError
from ..core.loader.writer import save_safetensors

logger = logging.getLogger(__name__)

_STATE_NAME = re.compile(r"step-(\d+)")


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Index of the epoch in which the next step lies."""
    step_in_epoch: int = 0
    """Optimizer steps done in that epoch."""


@dataclass(frozen=True)
class TrainingState:
    """What a run needs to go on as if it had never stopped."""

    progress: Progress
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    lr_scheduler: dict[str, Any]
    scaler: dict[str, Any]
    options: dict[str, Any]
    """Options that alter the training, for comparison with those of the resumed run."""


def check_output_folder(output_path: Path, resume: str) -> None:
    """Refuse a folder that holds another run, unless that run is to be continued.

    Raises:
        UserError: the folder holds a run and ``resume`` is ``never``, or it is not a folder.
    """
    if output_path.exists() and not output_path.is_dir():
        raise UserError(f"output_path {output_path} is a file; name a folder.")
    existing = next(path for path in (output_path, *output_path.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output_path {output_path}: nothing can be written in {existing}; choose another folder.")
    if resume == "never" and (found := _traces_of_a_run(output_path)):
        raise UserError(f"output_path {output_path} holds another run ({found}); choose an empty folder, or continue "
                        "that run with --resume auto.")
    if resume not in ("never", "auto") and not Path(resume).is_dir():
        raise UserError(f"resume {resume!r}: there is no such state folder; use auto, never, or a folder such as "
                        f"{output_path / 'state' / 'step-100'}.")


def _traces_of_a_run(output_path: Path) -> str | None:
    for pattern in ("metrics.jsonl", "state/step-*", "step-*.safetensors", "epoch-*.safetensors"):
        for path in output_path.glob(pattern):
            return str(path.relative_to(output_path))
    return None


def save_state(folder: Path, state: TrainingState) -> None:
    """Write a state as ``folder/step-N``, then remove the older ones."""
    final = folder / f"step-{state.progress.step}"
    partial = folder / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_state(partial, state)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync_folder(folder)
    except OSError as error:
        raise UserError(f"cannot save {final}: {error.strerror or error}; the previous state was kept.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if not verify_state(final):
        raise UserError(f"the state just written to {final} does not read back as written; the disk may be failing. "
                        "The previous state was kept.")
    for other in folder.glob("step-*"):
        if other != final:
            shutil.rmtree(other)


def _write_state(partial: Path, state: TrainingState) -> None:
    partial.mkdir(parents=True)
    tensors, scalars = _flatten_optimizer(state.optimizer)
    save_safetensors(partial / "weights.safetensors", state.weights, {})
    save_safetensors(partial / "optimizer.safetensors", tensors, {})
    _write(partial / "state.json", {
        "progress": asdict(state.progress), "optimizer": scalars, "lr_scheduler": state.lr_scheduler,
        "scaler": state.scaler, "options": state.options,
    })
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(partial.iterdir())}
    _write(partial / "manifest.json", files)


def verify_state(folder: Path) -> bool:
    """Whether every file of the state has the size and the hash that its manifest gives."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return False
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return False
    return all(
        (folder / name).is_file()
        and (folder / name).stat().st_size == entry["bytes"]
        and _sha256(folder / name) == entry["sha256"]
        for name, entry in files.items()
    )


def find_state(output_path: Path, resume: str) -> Path | None:
    """The state folder to continue from, or None to start at step 0.

    Raises:
        UserError: the folder that was named is damaged, or every one that there is.
    """
    if resume == "never":
        return None
    if resume != "auto":
        if not verify_state(Path(resume)):
            raise UserError(f"resume {resume}: the state is incomplete or damaged; use --resume auto to take the "
                            "newest complete one.")
        return Path(resume)
    states = [path for path in (output_path / "state").glob("step-*") if _STATE_NAME.fullmatch(path.name)]
    states.sort(key=lambda path: int(path.name.removeprefix("step-")), reverse=True)
    found = next((path for path in states if verify_state(path)), None)
    if states and found is None:
        raise UserError(f"every state in {output_path / 'state'} is incomplete or damaged; move {output_path} away to "
                        "start from the beginning.")
    if found is None and (trace := _traces_of_a_run(output_path)):
        logger.warning("%s holds %s but no state to continue from; the run starts again at step 0", output_path, trace)
    return found


def load_state(folder: Path) -> TrainingState:
    """Read a verified state."""
    document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return TrainingState(
        progress=Progress(**document["progress"]),
        weights=load_file(folder / "weights.safetensors"),
        optimizer=_unflatten_optimizer(load_file(folder / "optimizer.safetensors"), document["optimizer"]),
        lr_scheduler=document["lr_scheduler"],
        scaler=document["scaler"],
        options=document["options"],
    )


def refuse_changed_options(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a ``UserError`` that names the options with which a resumed run would be another run."""
    changed = [
        f"{name}: {saved.get(name)!r} -> {now.get(name)!r}"
        for name in dict.fromkeys([*saved, *now]) if saved.get(name) != now.get(name)
    ]
    if changed:
        raise UserError(f"the resumed run was started with other options ({'; '.join(changed)}); set them back, or "
                        "start a new run in another folder, with --lora_checkpoint for the old weights.")


def _flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split an optimizer's ``state_dict`` into tensors and what JSON can hold."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        for name, value in entry.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                scalars.setdefault(str(index), {})[name] = value
    return tensors, {"param_groups": state["param_groups"], "scalars": scalars}


def _unflatten_optimizer(tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    for index, entry in scalars["scalars"].items():
        state.setdefault(int(index), {}).update(entry)
    return {"state": state, "param_groups": scalars["param_groups"]}


def _write(path: Path, document: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows cannot open a folder for syncing
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
