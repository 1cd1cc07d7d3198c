"""LoRA added into the weights themselves, and taken out again without a trace."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .state import LoraLayer, LoraState
from .targets import AdaptableLayer

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_diffsynth_fused_loras"


@dataclass
class _Fused:
    """What was added to a network, and its weights from before."""

    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    applied: list[tuple[LoraState, float]] = field(default_factory=list)


def fuse_lora(module: torch.nn.Module, layers: Mapping[str, AdaptableLayer], state: LoraState, strength: float) -> None:
    """Add ``strength`` times a LoRA to the weights, summed in float32 from the untouched ones.

    Args:
        layers: Layer name -> the layer that holds the weight, of ``module``.
    """
    record: _Fused = module.__dict__.setdefault(_ATTRIBUTE, _Fused())
    record.applied.append((state, strength))
    coarse = False
    for name in state.layers:
        weight = layers[name].weight
        if name not in record.originals:
            record.originals[name] = weight.detach().to("cpu", copy=True)
        original = record.originals[name].to(weight.device, torch.float32)
        change = torch.zeros_like(original)
        for applied, factor in record.applied:
            if name in applied.layers:
                change += weight_change(applied.layers[name], original, factor)
        with torch.no_grad():
            weight.copy_((original + change).to(weight.dtype))
        coarse = coarse or weight.dtype.itemsize == 1
    if coarse:
        logger.warning("a LoRA was fused into float8 weights, whose steps are larger than most of its changes; "
                       "hotload=True keeps it exact.")


def fused_fingerprint(module: torch.nn.Module | None) -> str:
    """What is fused into a network, as a short text that is equal for equal LoRAs; empty when nothing is."""
    record: _Fused | None = getattr(module, _ATTRIBUTE, None)
    if record is None:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for state, strength in record.applied:
        digest.update(repr(strength).encode())
        for name, layer in sorted(state.layers.items()):
            digest.update(f"{name}{layer.scale}".encode())
            if layer.dora_scale is not None:
                digest.update(layer.dora_scale.float().cpu().numpy().tobytes())
            digest.update(layer.down.float().cpu().numpy().tobytes() + layer.up.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def unfuse_lora(module: torch.nn.Module, layers: Mapping[str, AdaptableLayer]) -> None:
    """Restore the weights from before the first fused LoRA, bit for bit."""
    record: _Fused | None = module.__dict__.pop(_ATTRIBUTE, None)
    if record is None:
        return
    with torch.no_grad():
        for name, original in record.originals.items():
            layers[name].weight.copy_(original)


@dataclass(frozen=True)
class TakenOut:
    """Weights that a fused LoRA had changed, and the record of what was fused."""

    weights: dict[str, torch.Tensor]
    record: _Fused


def take_out_fused(module: torch.nn.Module, layers: Mapping[str, AdaptableLayer]) -> TakenOut | None:
    """As ``unfuse_lora``, and keep on the CPU what ``restore_fused`` needs."""
    record: _Fused | None = getattr(module, _ATTRIBUTE, None)
    if record is None:
        return None
    taken = TakenOut({name: layers[name].weight.detach().to("cpu", copy=True) for name in record.originals}, record)
    unfuse_lora(module, layers)
    return taken


def restore_fused(module: torch.nn.Module, layers: Mapping[str, AdaptableLayer], taken: TakenOut | None) -> None:
    """Undo ``take_out_fused``, bit for bit."""
    if taken is None:
        return
    with torch.no_grad():
        for name, weight in taken.weights.items():
            layers[name].weight.copy_(weight)
    module.__dict__[_ATTRIBUTE] = taken.record


def weight_change(layer: LoraLayer, original: torch.Tensor, strength: float) -> torch.Tensor:
    """What a layer of a LoRA adds to a weight, in float32.

    Args:
        original: The weight without any adapter, float32; a DoRA depends on it.
    """
    delta = layer.delta(original.device) * strength
    if layer.dora_scale is None:
        return delta
    # DoRA: rows of trained norm in the direction of the changed rows
    moved = original + delta
    norms = moved.flatten(1).norm(dim=1)
    factors = layer.dora_scale.to(original.device, torch.float32).flatten() / norms
    return moved * factors.reshape(-1, *[1] * (moved.ndim - 1)) - original
