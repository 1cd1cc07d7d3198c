"""LoRA tensors in the naming of diffusers, kohya, ComfyUI and DiffSynth-Studio: written in one, read in any."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..core.errors import UserError, did_you_mean
from ..models.spec import ModelFamily
from .names import ComponentNames, family_names
from .state import LoraLayer, LoraState, fuse, number_text, one_value, share_down, unfuse

FORMATS = ("diffusers", "kohya", "comfyui", "diffsynth")
ADAPTER_METADATA = "lora_adapter_metadata"
"""Where diffusers and peft look for alpha; never in files with alpha tensors, to which they would misapply it."""

_SUFFIXES = {
    "diffusers": (".lora_A.weight", ".lora_B.weight"),
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    # lora_down rather than lora_A: diffusers converts these names only in that spelling
    "comfyui": (".lora_down.weight", ".lora_up.weight"),
    "diffsynth": (".lora_A.default.weight", ".lora_B.default.weight"),
}
_DORA_SUFFIX = ".lora_magnitude_vector"
_OWN_METADATA = frozenset((
    "format", "lora_format", "rank", "alpha", "rslora", "components", ADAPTER_METADATA, "ss_network_module",
    "ss_network_dim", "ss_network_alpha", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256",
))
"""What describes one file alone: written anew for each, never copied from another (hashes would be wrong)."""


def resolve_format(fmt: str, family: ModelFamily) -> str:
    """The format that ``auto`` stands for, or ``fmt`` itself.

    Raises:
        UserError: there is no such format.
    """
    if fmt == "auto":
        return family.lora_format
    if fmt not in FORMATS:
        raise UserError(f"lora_format {fmt!r} is not known; use auto, {', '.join(FORMATS)}."
                        f"{did_you_mean(fmt, FORMATS)}")
    return fmt


def check_format(family: ModelFamily, fmt: str, component: str, modules: Iterable[str], dora: bool = False) -> None:
    """Make sure, before hours of training, that a LoRA of these layers can be written in this format.

    Raises:
        UserError: names the layer that has no name there, and the formats that have one.
    """
    fmt = resolve_format(fmt, family)
    names = family_names(family).components.get(component)
    if names is None:
        raise UserError(f"no LoRA file format has names for the layers of {component!r}; train a LoRA of "
                        f"{' or '.join(family_names(family).components)}, or {component!r} itself.")
    if dora and fmt != "diffusers":
        raise UserError(f"the {fmt} format cannot hold a DoRA; use --lora_format diffusers.")
    for module in modules:
        if names.file_match(module, fmt) is None:
            others = [other for other in FORMATS if names.file_match(module, other) is not None and not dora]
            remedy = f"use --lora_format {' or '.join(others)}, or leave it" if others else "leave it"
            raise UserError(f"layer {module!r} of {component} has no name in the {fmt} format; "
                            f"{remedy} out of lora_target_modules.")


def to_tensors(
    states: Mapping[str, LoraState], family: ModelFamily, fmt: str, *, fold: bool = False
) -> dict[str, torch.Tensor]:
    """Tensors of a file in this format, contiguous float32 on the CPU, in a fixed order.

    Args:
        fold: Move alpha into ``up``, for containers that cannot hold the diffusers metadata.
    """
    tensors: dict[str, torch.Tensor] = {}
    for component, state in states.items():
        dora = any(layer.dora_scale is not None for layer in state.layers.values())
        check_format(family, fmt, component, state.layers, dora)
        _check_values(component, state)
        names = family_names(family).components[component]
        down_suffix, up_suffix = _SUFFIXES[fmt]
        for name, layer in _file_layers(state, names, fmt).items():
            if fmt == "diffsynth" or fold:
                layer = layer.folded()
            tensors[name + down_suffix] = layer.down
            tensors[name + up_suffix] = layer.up
            if fmt in ("kohya", "comfyui"):
                tensors[name + ".alpha"] = torch.tensor(layer.plain_alpha, dtype=torch.float32)
            if layer.dora_scale is not None:
                tensors[name + _DORA_SUFFIX] = layer.dora_scale
    return {key: tensors[key].detach().to("cpu", torch.float32).contiguous() for key in sorted(tensors)}


def _check_values(component: str, state: LoraState) -> None:
    """No file may hold numbers that are none, nor a mixture that readers would take for something else."""
    plain = [name for name, layer in state.layers.items() if layer.dora_scale is None]
    if 0 < len(plain) < len(state.layers):
        raise UserError(f"some layers of {component} are DoRA and others, such as {plain[0]!r}, are not; no LoRA file "
                        "format can say so.")
    for name, layer in state.layers.items():
        for factor in (layer.down, layer.up, layer.dora_scale):
            if factor is not None and not bool(factor.isfinite().all()):
                raise UserError(f"layer {name!r} of {component} holds values that are not finite (NaN or infinite); "
                                "such a LoRA is not written.")


def file_modules(states: Mapping[str, LoraState], family: ModelFamily, fmt: str) -> set[str] | None:
    """Names of all modules in a file of this format; None when one of the layers has no name there."""
    modules: set[str] = set()
    for component, state in states.items():
        names = family_names(family).components[component]
        for module in state.layers:
            match = names.file_match(module, fmt)
            if match is None:
                return None
            modules.add(names.file_name(match, fmt))
    return modules


def unnamed_layers(states: Mapping[str, LoraState], family: ModelFamily, fmt: str) -> list[str]:
    """Layers, as ``component: layer``, that have no name in this format."""
    known = family_names(family).components
    return [f"{component}: {module}" for component, state in states.items() for module in state.layers
            if known[component].file_match(module, fmt) is None]


def map_layers(
    states: Mapping[str, LoraState], family: ModelFamily, fmt: str, change: Callable[[str, LoraLayer], LoraLayer]
) -> dict[str, LoraState]:
    """Change adapters layer by layer, as they were trained.

    Layers of ours that a file of this format keeps in one weight (q, k and v) are one layer where they share their
    ``down`` factor, so that they still share it afterwards; otherwise each is a layer of its own.

    Args:
        change: Name and layer -> the new layer.
    """
    changed: dict[str, LoraState] = {}
    for component, state in states.items():
        names = family_names(family).components[component]
        layers: dict[str, LoraLayer] = {}
        for module, layer in state.layers.items():
            match = names.file_match(module, fmt)
            assert match is not None, f"{module} has no name in the {fmt} format"
            parts = [state.layers.get(part) for part in match.ours]
            if module in layers:
                continue
            if len(parts) > 1 and share_down(parts):
                layers.update(unfuse(match, change(names.file_name(match, fmt), fuse(match, parts))))
            else:
                layers[module] = change(module if len(states) == 1 else f"{component}.{module}", layer)
        changed[component] = LoraState(layers, dict(state.metadata), component)
    return changed


def _file_layers(state: LoraState, names: ComponentNames, fmt: str) -> dict[str, LoraLayer]:
    layers: dict[str, LoraLayer] = {}
    for module, layer in state.layers.items():
        match = names.file_match(module, fmt)
        assert match is not None  # check_format has looked
        name = names.file_name(match, fmt)
        if name in layers:
            continue
        if len(match.ours) == 1 and match.rule.original == match.rule.ours[0]:
            layers[name] = layer
        else:
            layers[name] = fuse(match, [state.layers.get(part) for part in match.ours])
    return layers


def check_strengths(keys: Iterable[str], fmt: str) -> str | None:
    """The first module of a file with alpha tensors that has none, as a sentence; None when all have."""
    present = set(keys)
    suffix = _SUFFIXES[fmt][0]
    for key in sorted(present):
        if key.endswith(suffix) and f"{key.removesuffix(suffix)}.alpha" not in present:
            return f"layer {key.removesuffix(suffix)!r} has lost its alpha"
    return None


def file_metadata(
    states: Mapping[str, LoraState],
    tensors: Mapping[str, torch.Tensor],
    family: ModelFamily,
    fmt: str,
    base: str = "",
    options: Mapping[str, Any] | None = None,
    kept: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Metadata of a file in this format that holds ``tensors``.

    Args:
        kept: Metadata of the file that the adapters come from; what still holds of them stays.
    """
    layers = [layer for state in states.values() for layer in state.layers.values()]
    metadata = {key: value for key, value in (kept or {}).items() if key not in _OWN_METADATA}
    metadata |= {
        "format": "pt",  # the key by which Hugging Face libraries know the framework
        "lora_format": fmt,
        "rank": one_value(layer.rank for layer in layers),
        "alpha": one_value(layer.alpha for layer in layers),
        "base": base or metadata.get("base") or family.name,
        "components": ",".join(states),
    }
    if any(layer.use_rslora for layer in layers):
        metadata["rslora"] = "true"
    if options:
        metadata["options"] = json.dumps(dict(options), sort_keys=True, default=str, ensure_ascii=False)
    if fmt == "diffusers":
        config: dict[str, Any] = {}
        for component, state in states.items():
            config.update(_peft_config(state, family_names(family).components[component]))
        metadata[ADAPTER_METADATA] = json.dumps(config, indent=2, sort_keys=True)
    if fmt == "kohya":
        ranks = (tensor.shape[0] for key, tensor in tensors.items() if key.endswith(_SUFFIXES[fmt][0]))
        alphas = (float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha"))
        metadata.update(ss_network_module="networks.lora", ss_network_dim=one_value(ranks),
                        ss_network_alpha=one_value(alphas))
    return metadata


def _peft_config(state: LoraState, names: ComponentNames) -> dict[str, Any]:
    """A peft ``LoraConfig`` of this adapter, its keys under the component's prefix as diffusers writes them."""
    layers = state.layers
    rslora = all(layer.use_rslora for layer in layers.values())
    alphas = {name: layer.alpha if rslora else layer.plain_alpha for name, layer in layers.items()}
    rank, alpha = state.rank, max(alphas.values(), key=list(alphas.values()).count)
    # peft reads the names as ends of names: a name without a dot could also hit layers inside the blocks
    exact = any("." not in name for name in layers)
    anchor = "^" if names.is_denoiser else ""
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": json.loads(number_text(alpha)),
        "target_modules": f"^({'|'.join(map(re.escape, layers))})$" if exact else sorted(layers),
        "rank_pattern": {anchor + name: layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {anchor + name: value for name, value in alphas.items() if value != alpha},
        "use_rslora": rslora,
        "use_dora": any(layer.dora_scale is not None for layer in layers.values()),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }
    return {names.diffusers + key: value for key, value in config.items()}
