"""LoRA files: written so that they can be trusted, read whatever wrote them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..core.errors import UserError
from ..core.loader import WeightReader, save_safetensors, save_torch_file
from ..models.spec import ModelFamily
from .formats import ADAPTER_METADATA, check_strengths, file_metadata, resolve_format, to_tensors
from .names import family_names
from .reading import ReadLora, from_tensors
from .state import LoraState, same_change

logger = logging.getLogger(__name__)

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file and what it was found to be."""

    path: Path
    family: ModelFamily
    format: str
    states: dict[str, LoraState]
    """Component -> adapter in our layer names."""
    metadata: dict[str, str]
    num_matched: int
    num_modules: int
    """Layers in the file; more than ``num_matched`` only where that was allowed."""

    @property
    def dtypes(self) -> list[str]:
        """Dtypes of the factors."""
        layers = [layer for state in self.states.values() for layer in state.layers.values()]
        return sorted({str(layer.down.dtype).removeprefix("torch.") for layer in layers})


def save_lora(
    path: str | Path,
    states: Mapping[str, LoraState],
    family: ModelFamily,
    fmt: str = "auto",
    base: str = "",
    options: Mapping[str, Any] | None = None,
    kept: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> None:
    """Write adapters to one file, which takes its name when every layer read back from it is what was meant.

    Args:
        path: Ends in ``.safetensors``, or in ``.ckpt`` for a pickled state dict as the older page writes it.
        states: Component -> adapter.
        family: Whose tables name the layers.
        fmt: ``auto``, ``diffusers``, ``kohya``, ``comfyui`` or ``diffsynth``.
        base: Name of the base model for the metadata; default that of ``kept``, else the family.
        options: Training options for the metadata.
        kept: Metadata of the file that the adapters come from; what still holds of them stays.
        dtype: Dtype of the factors in the file; None keeps that of ``states`` where this loses nothing.
    Raises:
        UserError: a layer has no name in this format, its values are not finite, or the disk is full.
    """
    path = Path(path)
    fmt = resolve_format(fmt, family)
    states = {component: state for component, state in states.items() if state.layers}
    if not states:
        raise UserError(f"there is no LoRA to write to {path}.")
    is_pickle = path.suffix in PICKLE_SUFFIXES
    fold = is_pickle and fmt == "diffusers"
    tensors = _in_dtype(to_tensors(states, family, fmt, fold=fold), states, dtype)
    check = partial(_check_written, tensors=tensors, states=states, family=family, fmt=fmt, fold=fold, shown=path)
    if is_pickle:
        save_torch_file(path, tensors, check)
    else:
        save_safetensors(path, tensors, file_metadata(states, tensors, family, fmt, base, options, kept), check)


def load_lora_file(path: str | Path, family: ModelFamily, allow_unmatched: bool = False) -> dict[str, LoraState]:
    """Read a LoRA file of any known format.

    Args:
        allow_unmatched: Leave out layers that fit nothing, with a warning, instead of refusing the file.
    Returns:
        Component -> adapter in our layer names.
    Raises:
        UserError: the file cannot be read, is no LoRA, or is one of another family.
    """
    return read_lora_file(path, family, allow_unmatched).states


def read_lora_file(path: str | Path, family: ModelFamily, allow_unmatched: bool = False) -> LoraFile:
    """As ``load_lora_file``, with what else is known of the file."""
    path = Path(path)
    with WeightReader(path) as reader:
        try:
            read = from_tensors(reader.tensors, reader.get, reader.metadata, family, allow_unmatched)
        except UserError as error:
            raise UserError(f"LoRA file {path}: {error}") from error
        metadata = dict(reader.metadata)
    parts = ", ".join(f"{len(state.layers)} layers of {name}" for name, state in read.states.items())
    logger.info("%s: matched %d of %d modules (%s)", path.name, len(read.modules), read.num_modules, parts)
    if read.ignored:
        logger.warning("%s: ignored %d tensors that fit nothing in %s, for example %s.", path, len(read.ignored),
                       family.name, ", ".join(read.ignored[:3]))
    return LoraFile(path, family, read.format(family), read.states, metadata, len(read.modules), read.num_modules)


def recognise_lora_file(path: str | Path, family: str | None = None) -> LoraFile:
    """Read a LoRA file whose family is found by trying.

    Args:
        family: Name of the family, where the file does not tell.
    Raises:
        UserError: no family knows all of its layers, or several do.
    """
    from ..models.registry import all_families, get_family

    if family is not None:
        return read_lora_file(path, get_family(family))
    found, reasons = [], []
    for candidate in all_families():
        try:
            found.append(read_lora_file(path, candidate))
        except UserError as error:
            reasons.append(str(error))
    if not found:
        raise UserError(" ".join(reasons))
    if len(found) > 1:
        names = " or ".join(file.family.name for file in found)
        raise UserError(f"LoRA file {path} fits {names}; say which with --family.")
    return found[0]


def change_difference(first: Mapping[str, LoraState], second: Mapping[str, LoraState]) -> float:
    """How far two sets of adapters change the weights differently: norm of the difference by norm of the change.

    Source: the norms are traces of small Gram matrices of the factors, so that no dense change is formed.
    """
    different = size = 0.0
    for component in first.keys() | second.keys():
        ours = first.get(component, LoraState({})).layers
        theirs = second.get(component, LoraState({})).layers
        for name in ours.keys() | theirs.keys():
            parts = [(layer, sign) for layer, sign in ((ours.get(name), 1.0), (theirs.get(name), -1.0)) if layer]
            ups = [layer.up.double().flatten(1) * (layer.scale * sign) for layer, sign in parts]
            downs = [layer.down.double().flatten(1) for layer, _ in parts]
            up, down = torch.cat(ups, dim=1), torch.cat(downs)
            different += max(0.0, float(((up.T @ up) * (down @ down.T)).sum()))
            size += float(((ups[0].T @ ups[0]) * (downs[0] @ downs[0].T)).sum())
    return math.sqrt(different / size) if size else math.sqrt(different)


def _in_dtype(
    tensors: dict[str, torch.Tensor], states: Mapping[str, LoraState], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Factors in the dtype of the file; alpha stays in float32."""
    exact = dtype is None
    if dtype is None:
        given = {layer.down.dtype for state in states.values() for layer in state.layers.values()}
        dtype = given.pop() if len(given) == 1 else torch.float32
    if dtype == torch.float32 or (dtype.itemsize > 4 and exact):
        return tensors
    cast = {key: tensor if key.endswith(".alpha") else tensor.to(dtype) for key, tensor in tensors.items()}
    if exact and not all(torch.equal(cast[key].float(), tensor) for key, tensor in tensors.items()):
        logger.info("the factors are written in float32: %s would round them here.",
                    str(dtype).removeprefix("torch."))
        return tensors
    for key, tensor in cast.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{key} holds values that are too large for {str(dtype).removeprefix('torch.')}; "
                            "use bfloat16 or float32.")
    return cast


def _check_written(
    path: Path, tensors: Mapping[str, torch.Tensor], states: Mapping[str, LoraState], family: ModelFamily, fmt: str,
    fold: bool, shown: Path,
) -> None:
    """Make sure that a file just written holds every tensor, layer and strength that was meant.

    Raises:
        RuntimeError: it does not; a bug here, or a disk that lies.
    """
    with WeightReader(path) as reader:
        written, metadata = {key: reader.get(key) for key in reader.tensors}, dict(reader.metadata)
    problem = _difference(written, tensors)
    if not problem:
        read = from_tensors(written, written.__getitem__, metadata, family)
        problem = _layer_difference(read, states, fmt, fold) or _missing_strength(written, metadata, states, family,
                                                                                  fmt, fold)
    if problem:
        raise RuntimeError(f"{shown} was not written: {problem}.")


def _difference(written: Mapping[str, torch.Tensor], meant: Mapping[str, torch.Tensor]) -> str | None:
    for key in sorted(written.keys() ^ meant.keys()):
        return f"tensor {key!r} is {'missing from' if key in meant else 'too much in'} what reads back"
    for key, tensor in meant.items():
        if not torch.equal(written[key], tensor):
            return f"tensor {key!r} reads back differently"
    return None


def _layer_difference(read: ReadLora, states: Mapping[str, LoraState], fmt: str, fold: bool) -> str | None:
    """The first layer whose change of the weights is not the one meant."""
    covered = {(component, ours): len(match.ours) for component, match in read.modules.values() for ours in match.ours}
    for component, state in states.items():
        found = read.states.get(component, LoraState({})).layers
        for name, layer in state.layers.items():
            if (component, name) not in covered:
                return f"layer {name!r} of {component} is missing from it"
            # a part of a fused weight that changes nothing leaves no trace
            if name not in found and layer.up.any():
                return f"layer {name!r} of {component} is missing from it"
            if name in found and not same_change(layer, found[name], _tolerance(found[name].up.dtype)):
                return f"layer {name!r} of {component} reads back differently"
            # layers without effect yet must also keep their strength
            alone = covered[component, name] == 1 and fmt != "diffsynth" and not fold
            if alone and not math.isclose(found[name].scale, layer.scale, rel_tol=1e-6):
                return f"layer {name!r} of {component} has lost its alpha"
        for name in found.keys() - state.layers.keys():
            if found[name].up.any():
                return f"layer {name!r} of {component} has come from nowhere"
    return None


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-6 if dtype.itemsize >= 4 else 2 * torch.finfo(dtype).eps


def _missing_strength(
    written: Mapping[str, torch.Tensor], metadata: Mapping[str, str], states: Mapping[str, LoraState],
    family: ModelFamily, fmt: str, fold: bool,
) -> str | None:
    """Alpha where this format keeps it, also where its absence happens to mean the same to this reader."""
    if fmt in ("kohya", "comfyui"):
        return check_strengths(written, fmt)
    if fmt == "diffusers" and not fold:
        peft = json.loads(metadata.get(ADAPTER_METADATA, "{}"))
        for component in states:
            prefix = family_names(family).components[component].diffusers
            for key in ("r", "lora_alpha"):
                if prefix + key not in peft:
                    return f"{component} has lost its alpha: {prefix + key} is missing from the metadata"
    return None
