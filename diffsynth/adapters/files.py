"""LoRA files: written so that they can be trusted, read whatever wrote them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.loader import WeightReader, save_safetensors, save_torch_file
from ..models.spec import ModelFamily
from .formats import file_metadata, from_tensors, resolve_format, to_tensors
from .state import LoraState, same_change

logger = logging.getLogger(__name__)


def save_lora(
    path: str | Path,
    states: Mapping[str, LoraState],
    family: ModelFamily,
    fmt: str = "auto",
    base: str = "",
    options: Mapping[str, Any] | None = None,
) -> None:
    """Write adapters to one file, read it back and compare every layer's change with what was meant.

    Args:
        path: Ends in ``.safetensors``, or in ``.ckpt`` for a pickled state dict as the older page writes it.
        states: Component -> adapter.
        family: Whose tables name the layers.
        fmt: ``auto``, ``diffusers``, ``kohya``, ``comfyui`` or ``diffsynth``.
        base: Name of the base model for the metadata; default the family.
        options: Training options for the metadata.
    Raises:
        UserError: a layer has no name in this format, or the disk is full.
    """
    path = Path(path)
    fmt = resolve_format(fmt, family)
    states = {component: state for component, state in states.items() if state.layers}
    if not states:
        raise UserError(f"there is no LoRA to write to {path}.")
    is_pickle = path.suffix in (".ckpt", ".pt", ".pth", ".bin")
    tensors = to_tensors(states, family, fmt, fold=is_pickle and fmt == "diffusers")
    if is_pickle:
        save_torch_file(path, tensors)
    else:
        save_safetensors(path, tensors, file_metadata(states, tensors, family, fmt, base, options))
    _check_written(path, states, family)


def load_lora_file(path: str | Path, family: ModelFamily) -> dict[str, LoraState]:
    """Read a LoRA file of any known format.

    Returns:
        Component -> adapter in our layer names.
    Raises:
        UserError: the file cannot be read, is no LoRA, or is one of another family.
    """
    path = Path(path)
    states, num_modules = _read(path, family)
    parts = ", ".join(f"{len(state.layers)} layers of {name}" for name, state in states.items())
    logger.info("%s: matched %d of %d modules (%s)", path.name, num_modules, num_modules, parts)
    return states


def _read(path: Path, family: ModelFamily) -> tuple[dict[str, LoraState], int]:
    with WeightReader(path) as reader:
        try:
            states = from_tensors(reader.tensors, reader.get, reader.metadata, family)
        except UserError as error:
            raise UserError(f"LoRA file {path}: {error}") from error
        return states, sum(".alpha" not in key for key in reader.tensors) // 2


def _check_written(path: Path, states: Mapping[str, LoraState], family: ModelFamily) -> None:
    written, _ = _read(path, family)
    for component, state in states.items():
        read = written.get(component, LoraState({})).layers
        for name, layer in state.layers.items():
            if layer.up.any() and (name not in read or not same_change(layer, read[name])):
                path.unlink()
                raise RuntimeError(f"{path}: layer {name!r} of {component} reads back differently; it was removed.")
