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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..config import TrainConfig
from ..core.errors import UserError
from ..core.loader.writer import write_safetensors
from .state_check import check_form

logger = logging.getLogger(__name__)

STATE_VERSION = 1
_STATE_NAME = re.compile(r"step-(\d+)")
_SET_ASIDE = "before-"
_FILES = {"weights.safetensors", "optimizer.safetensors", "state.json"}


@dataclass
class Progress:
    """How far a run is. Saves happen between two optimizer steps, so that no gradient is ever half accumulated."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Index of the epoch in which the next step lies."""
    step_in_epoch: int = 0
    """Optimizer steps done in that epoch."""
    parts: list[tuple[int, int]] = field(default_factory=list)
    """Steps of that epoch that were done with another number of processes: (items per step, steps), in order."""
    step_size: int = 0
    """Items per step since then; 0 in states of version 0."""

    def start_next_epoch(self) -> None:
        self.epoch, self.step_in_epoch, self.parts = self.epoch + 1, 0, []


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
    config: dict[str, Any] = field(default_factory=dict)
    """The resolved configuration, the seed that keys the generator among it."""
    ema: dict[str, torch.Tensor] = field(default_factory=dict)
    """Averaged weights; empty where none are kept."""
    ema_updates: int = 0
    monitors: dict[str, Any] = field(default_factory=dict)
    """What else watches the run (bad steps, spikes of the loss, best held-out loss): name -> its ``state_dict``."""


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


def save_state(folder: Path, state: TrainingState) -> Path:
    """Write a state as ``folder/step-N``, read it back, then remove the others.

    Raises:
        UserError: the disk is full or failing; the previous state is there as before.
    """
    final = folder / f"step-{state.progress.step}"
    partial = folder / f".{final.name}.partial"
    try:
        _remove_folder(partial)
        _write_state(partial, state)
        if not verify_state(partial):
            raise UserError(f"the state just written to {partial} does not read back as written; the disk may be "
                            "failing. The previous state was kept.")
        if final.exists():
            _set_aside(final)
        partial.rename(final)
        _sync_folder(folder)
        for other in (*folder.glob("step-*"), *folder.glob(f"{_SET_ASIDE}step-*")):
            if other != final:
                # half removed it must not have the name of a state
                leaving = other.with_name(f".{other.name}.removed")
                _remove_folder(leaving)
                other.rename(leaving)
                _remove_folder(leaving)
    except OSError as error:
        raise UserError(f"cannot save {final}: {error.strerror or error}; the previous state was kept. Free some "
                        "space or choose another output folder.") from error
    finally:
        _remove_folder(partial)
    return final


def remove_leftovers(output_path: Path) -> None:
    """Remove what a killed run left half written. To be called before anything is saved."""
    for folder, pattern in ((output_path / "state", ".*step-*"), (output_path, ".*.tmp"),
                            (output_path / "checkpoints", ".*.tmp")):
        for path in folder.glob(pattern):
            if path.is_dir():
                _remove_folder(path)
            else:
                path.unlink()


def set_newer_aside(output_path: Path, step: int) -> None:
    """Rename states after ``step``: a run that was told to go on from this one makes them anew, and must not find
    them when it is stopped before. The next save removes them."""
    for path in (output_path / "state").glob("step-*"):
        if _STATE_NAME.fullmatch(path.name) and int(path.name.removeprefix("step-")) > step:
            _set_aside(path)


def _set_aside(folder: Path) -> None:
    aside = folder.with_name(_SET_ASIDE + folder.name)
    _remove_folder(aside)
    folder.rename(aside)


def _remove_folder(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def _write_state(partial: Path, state: TrainingState) -> None:
    partial.mkdir(parents=True)
    tensors, scalars = _flatten_optimizer(state.optimizer)
    document = {
        "version": STATE_VERSION, "progress": {**asdict(state.progress), "accumulation_position": 0},
        "optimizer": scalars, "lr_scheduler": state.lr_scheduler, "scaler": state.scaler,
        "ema_updates": state.ema_updates, "monitors": state.monitors, "options": state.options,
        "config": state.config,
    }
    manifest = {
        "weights.safetensors": _write_file(partial / "weights.safetensors", state.weights),
        "optimizer.safetensors": _write_file(partial / "optimizer.safetensors", tensors),
        "state.json": _write_file(partial / "state.json", document),
    }
    if state.ema:
        manifest["ema.safetensors"] = _write_file(partial / "ema.safetensors", state.ema)
    # last: a folder that holds it holds everything else, on the disk
    _sync_folder(partial)
    _write_file(partial / "manifest.json", manifest)


def _write_file(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write tensors or JSON through to the disk; the size and the hash are those of what was meant."""
    with path.open("wb") as file:
        hashing = _HashingFile(file)
        if path.suffix == ".safetensors":
            write_safetensors(hashing, content, {})
        else:
            hashing.write(json.dumps(content, indent=1).encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashing.num_bytes, "sha256": hashing.digest.hexdigest()}


class _HashingFile:
    """Takes the hash of what is written, on its way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.num_bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self.file.write(data)


def verify_state(folder: Path) -> bool:
    """Whether every file of the state has the size and the hash that its manifest gives."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return False
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(files, dict) and _FILES <= set(files) <= _FILES | {"ema.safetensors"} and all(
        isinstance(entry, dict)
        and (folder / name).is_file()
        and (folder / name).stat().st_size == entry.get("bytes")
        and _sha256(folder / name) == entry.get("sha256")
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
    """Read a verified state.

    Raises:
        UserError: its files are whole, but they are not a state of this program.
    """
    try:
        document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if document.get("version", 0) > STATE_VERSION:
            raise UserError(f"the state {folder} was written by a newer version of diffsynth; resume with that one.")
        progress = {name: value for name, value in document["progress"].items() if name != "accumulation_position"}
        progress["parts"] = [(int(size), int(steps)) for size, steps in progress.get("parts", [])]
        check_form("progress", {**progress, "parts": [n for part in progress["parts"] for n in part]},
                   {**asdict(Progress()), "parts": [0]})
        averaged = folder / "ema.safetensors"
        return TrainingState(
            progress=Progress(**progress),
            weights=load_file(folder / "weights.safetensors"),
            optimizer=_unflatten_optimizer(load_file(folder / "optimizer.safetensors"), document["optimizer"]),
            lr_scheduler=document["lr_scheduler"],
            scaler=document["scaler"],
            options=document["options"],
            config=document.get("config", {}),
            ema=load_file(averaged) if averaged.exists() else {},
            ema_updates=document.get("ema_updates", 0),
            monitors=document.get("monitors", {}),
        )
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError, OSError,
            SafetensorError) as error:
        raise UserError(f"{folder} is not a state that diffsynth has written ({type(error).__name__}: {error}); name "
                        "another one with --resume.") from error


def refuse_changed_options(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a ``UserError`` that names the options with which a resumed run would be another run.

    An option that is younger than the saved run had, without being there, the value that is its default.
    """
    defaults = TrainConfig().model_dump(mode="json")
    changed = [
        f"{name}: {saved.get(name)!r} -> {now.get(name)!r}" for name in dict.fromkeys([*saved, *now])
        if saved.get(name, defaults.get(name)) != now.get(name)
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
