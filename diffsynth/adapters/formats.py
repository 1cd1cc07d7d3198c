"""LoRA tensors in the naming of diffusers, kohya, ComfyUI and DiffSynth-Studio: written in one, read in any."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..core.errors import UserError, did_you_mean
from ..models.keymap import Match
from ..models.spec import ModelFamily
from .names import ComponentNames, family_names
from .state import LoraLayer, LoraState, fuse, number_text, one_value, unfuse

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
_READ = (
    ("down", re.compile(r"\.(lora_A(\.\w+)?\.weight|lora_A|lora_down\.weight|lora(_linear_layer)?\.down\.weight)$")),
    ("down", re.compile(r"_lora\.down\.weight$")),
    ("up", re.compile(r"\.(lora_B(\.\w+)?\.weight|lora_B|lora_up\.weight|lora(_linear_layer)?\.up\.weight)$")),
    ("up", re.compile(r"_lora\.up\.weight$")),
    ("alpha", re.compile(r"\.alpha$")),
    ("dora", re.compile(r"\.lora_magnitude_vector(\.\w+)*$")),
)
_OTHER_ADAPTERS = re.compile(
    r"\.(hada_\w+|lokr_\w+|oft_\w+|boft_\w+|ia3_\w+|lora_mid\.weight|dora_scale|diff|diff_b|w_norm|b_norm|set_weight|"
    r"reshape_weight|lora_B\.(\w+\.)?bias)$"
)


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


def file_metadata(
    states: Mapping[str, LoraState],
    tensors: Mapping[str, torch.Tensor],
    family: ModelFamily,
    fmt: str,
    base: str,
    options: Mapping[str, Any] | None,
) -> dict[str, str]:
    """Metadata of a file in this format that holds ``tensors``."""
    layers = [layer for state in states.values() for layer in state.layers.values()]
    metadata = {
        "format": "pt",  # the key by which Hugging Face libraries know the framework
        "lora_format": fmt,
        "rank": one_value(layer.rank for layer in layers),
        "alpha": one_value(layer.alpha for layer in layers),
        "base": base or family.name,
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


@dataclass
class _Source:
    """The tensors of one module of a file."""

    keys: dict[str, str] = field(default_factory=dict)

    def add(self, role: str, key: str, module: str) -> None:
        if role in self.keys:
            raise UserError(f"layer {module!r} stands twice in the file: {self.keys[role]} and {key}.")
        self.keys[role] = key


def from_tensors(
    keys: Iterable[str], get: Callable[[str], torch.Tensor], metadata: Mapping[str, str], family: ModelFamily
) -> dict[str, LoraState]:
    """The adapters in a file of any known format, by component, in our names.

    Raises:
        UserError: the file is no LoRA, a LoRA of something else, or of a kind that is not supported.
    """
    sources, unknown = _group(keys)
    if not any("down" in source.keys or "up" in source.keys for source in sources.values()):
        others = [key for key in unknown if _OTHER_ADAPTERS.search(key)]
        if others:
            raise UserError(f"it is an adapter of another kind than LoRA (it holds {others[0]!r}); only LoRA and DoRA "
                            "are supported.")
        example = f", for example {unknown[0]!r}" if unknown else ""
        raise UserError(f"it is not a LoRA file: none of its {len(unknown) + len(sources)} tensors is a LoRA factor"
                        f"{example}; a checkpoint of a whole network goes into model_paths.")
    lookup = family_names(family)
    matched = {module: found for module in sources if (found := lookup.match(module))}
    unmatched = [module for module in sources if module not in matched]
    if unmatched or unknown:
        raise UserError(_mismatch(sources, unmatched, unknown, family))
    peft = json.loads(metadata[ADAPTER_METADATA]) if ADAPTER_METADATA in metadata else {}
    plain = {key: value for key, value in metadata.items() if key != ADAPTER_METADATA}
    states: dict[str, LoraState] = {}
    for module, (names, match) in matched.items():
        state = states.setdefault(names.component, LoraState({}, plain, names.component))
        for name, layer in _read_layer(module, sources[module], get, names, match, peft).items():
            if name in state.layers:
                raise UserError(f"the file changes layer {name!r} of {names.component} twice, once as {module!r}.")
            state.layers[name] = layer
    return states


def _group(keys: Iterable[str]) -> tuple[dict[str, _Source], list[str]]:
    """Tensors by module, and the keys that are no part of a LoRA."""
    sources: dict[str, _Source] = {}
    unknown = []
    for key in keys:
        for role, suffix in _READ:
            if found := suffix.search(key):
                module = key[: found.start()]
                sources.setdefault(module, _Source()).add(role, key, module)
                break
        else:
            unknown.append(key)
    return sources, unknown


def _mismatch(sources: Mapping[str, _Source], unmatched: list[str], unknown: list[str], family: ModelFamily) -> str:
    from ..models.registry import all_families

    if not unmatched:
        of_adapter = _OTHER_ADAPTERS.search(unknown[0])
        kind = "belongs to an adapter of another kind" if of_adapter else "is not part of a LoRA"
        return f"tensor {unknown[0]!r} {kind}; only plain LoRA and DoRA files are supported."
    for other in all_families():
        if other.name != family.name and all(map(family_names(other).match, sources)):
            pipeline = other.pipeline.rpartition(".")[2]
            return f"it is a LoRA of {other.name}, not of {family.name}; load it with {pipeline}."
    total = len(sources)
    if len(unmatched) == total:
        return (f"it is not a LoRA of {family.name}: none of its {total} layers exists there, "
                f"for example {unmatched[0]!r}.")
    return (f"it does not fit {family.name}: only {total - len(unmatched)} of its {total} layers match; "
            f"unknown are for example {', '.join(map(repr, unmatched[:3]))}.")


def _read_layer(
    module: str, source: _Source, get: Callable[[str], torch.Tensor], names: ComponentNames, match: Match,
    peft: Mapping[str, Any],
) -> dict[str, LoraLayer]:
    missing = [role for role in ("down", "up") if role not in source.keys]
    if missing:
        present = ", ".join(source.keys.values())
        raise UserError(f"layer {module!r} is incomplete: it has {present} but not the {missing[0]} factor.")
    down, up = get(source.keys["down"]), get(source.keys["up"])
    if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1] != down.shape[0]:
        raise UserError(f"layer {module!r}: factors of shapes {tuple(down.shape)} and {tuple(up.shape)} do not "
                        "multiply; the file is damaged.")
    rank = down.shape[0]
    layer = LoraLayer(down, up, float(rank), rank)
    if "alpha" in source.keys:
        layer = replace(layer, alpha=_alpha(get(source.keys["alpha"]), module))
    elif f"{names.diffusers}r" in peft:
        layer = _with_peft_scale(layer, match.original, names.diffusers, peft)
    if "dora" in source.keys:
        if len(match.ours) > 1 or match.rule.swap_halves:
            raise UserError(f"layer {module!r} is a DoRA of a fused weight, which is not supported.")
        return {match.ours[0]: replace(layer, dora_scale=get(source.keys["dora"]))}
    return unfuse(match, layer)


def _alpha(tensor: torch.Tensor, module: str) -> float:
    if tensor.numel() != 1 or not math.isfinite(alpha := float(tensor)) or alpha <= 0:
        raise UserError(f"layer {module!r}: alpha is {tensor.tolist()}, which is not one positive number; "
                        "the file is damaged.")
    return alpha


def _with_peft_scale(layer: LoraLayer, module: str, prefix: str, peft: Mapping[str, Any]) -> LoraLayer:
    """Scale as peft computes it from its configuration."""
    alpha = _pattern(peft.get(f"{prefix}alpha_pattern"), module, peft.get(f"{prefix}lora_alpha", layer.rank))
    return replace(layer, alpha=float(alpha), use_rslora=bool(peft.get(f"{prefix}use_rslora", False)))


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
