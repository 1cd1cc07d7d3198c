"""LoRA tensors in the naming of any known program, read into our own names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..core.errors import UserError
from ..models.keymap import Match
from ..models.spec import ModelFamily
from .formats import ADAPTER_METADATA, FORMATS, file_modules
from .names import ComponentNames, family_names
from .state import LoraLayer, LoraState, unfuse

MAX_ALPHA = 1e30
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


@dataclass
class _Source:
    """The tensors of one module of a file."""

    keys: dict[str, str] = field(default_factory=dict)

    def add(self, role: str, key: str, module: str) -> None:
        if role in self.keys:
            raise UserError(f"layer {module!r} stands twice in the file: {self.keys[role]} and {key}.")
        self.keys[role] = key


@dataclass(frozen=True)
class ReadLora:
    """What the tensors of a LoRA file are."""

    states: dict[str, LoraState]
    """Component -> adapter in our names."""
    modules: dict[str, tuple[str, Match]]
    """Layer as the file calls it -> component, and our layers that it stands for."""
    ignored: list[str]
    """Keys that fit nothing; empty unless they were allowed."""

    @property
    def num_modules(self) -> int:
        """Layers in the file, whether they fit or not."""
        return len(self.modules.keys() | {role_of(key)[0] for key in self.ignored})

    def format(self, family: ModelFamily) -> str:
        """Which format the layers' names are of."""
        for fmt in FORMATS:
            if file_modules(self.states, family, fmt) == self.modules.keys():
                return fmt
        first, (component, _) = next(iter(self.modules.items()))
        names = family_names(family).components[component]
        known = {"kohya": names.kohya, "comfyui": (names.comfyui,), "diffusers": (names.diffusers,)}
        return next((fmt for fmt, prefixes in known.items() if first.startswith(prefixes)), "diffsynth")


def role_of(key: str) -> tuple[str, str | None]:
    """Module and role (``down``, ``up``, ``alpha``, ``dora``) of a tensor; the role is None when it has none."""
    for role, suffix in _READ:
        if found := suffix.search(key):
            return key[: found.start()], role
    other = _OTHER_ADAPTERS.search(key)
    return (key[: other.start()] if other else key), None


def from_tensors(
    keys: Iterable[str], get: Callable[[str], torch.Tensor], metadata: Mapping[str, str], family: ModelFamily,
    allow_unmatched: bool = False,
) -> ReadLora:
    """The adapters in a file of any known format, by component, in our names.

    Args:
        allow_unmatched: Leave out what fits nothing instead of refusing the file; something must fit.
    Raises:
        UserError: the file is no LoRA, a LoRA of something else, or of a kind that is not supported.
    """
    keys = list(keys)
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
    if (unmatched or unknown) and not (allow_unmatched and matched):
        raise UserError(_mismatch(sources, unmatched, unknown, family))
    peft = _peft_metadata(metadata)
    plain = {key: value for key, value in metadata.items() if key != ADAPTER_METADATA}
    states: dict[str, LoraState] = {}
    for module, (names, match) in matched.items():
        state = states.setdefault(names.component, LoraState({}, plain, names.component))
        for name, layer in _read_layer(module, sources[module], get, names, match, peft).items():
            if name in state.layers:
                raise UserError(f"the file changes layer {name!r} of {names.component} twice, once as {module!r}.")
            state.layers[name] = layer
    modules = {module: (names.component, match) for module, (names, match) in matched.items()}
    left_out = {key for module in unmatched for key in sources[module].keys.values()} | set(unknown)
    return ReadLora(states, modules, [key for key in keys if key in left_out])


def _peft_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    if ADAPTER_METADATA not in metadata:
        return {}
    try:
        peft = json.loads(metadata[ADAPTER_METADATA])
    except (ValueError, RecursionError) as error:
        raise UserError(f"its metadata {ADAPTER_METADATA!r} is no JSON ({error}), so its strength is not known; "
                        "the file is damaged.") from error
    patterns = [value for key, value in peft.items() if key.endswith("_pattern")] if isinstance(peft, dict) else [None]
    if not all(isinstance(pattern, dict) for pattern in patterns):
        raise UserError(f"its metadata {ADAPTER_METADATA!r} is no configuration of peft, so its strength is not known; "
                        "the file is damaged.")
    return peft


def _group(keys: Iterable[str]) -> tuple[dict[str, _Source], list[str]]:
    """Tensors by module, and the keys that are no part of a LoRA."""
    sources: dict[str, _Source] = {}
    unknown = []
    for key in keys:
        module, role = role_of(key)
        if role is None:
            unknown.append(key)
        else:
            sources.setdefault(module, _Source()).add(role, key, module)
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
    if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1] != down.shape[0] or not down.numel():
        raise UserError(f"layer {module!r}: factors of shapes {tuple(down.shape)} and {tuple(up.shape)} do not "
                        "multiply; the file is damaged.")
    if not (down.is_floating_point() and up.is_floating_point()):
        raise UserError(f"layer {module!r}: factors of dtype {down.dtype} and {up.dtype} are no floating-point "
                        "numbers; quantised LoRA files are not supported.")
    if down.itemsize == 1 or up.itemsize == 1:  # float8, which torch does not compute with; bfloat16 holds its values
        down, up = (factor.to(torch.bfloat16) if factor.itemsize == 1 else factor for factor in (down, up))
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
    layers = unfuse(match, layer)
    for name, part in layers.items():
        if part.down.ndim == 4 and not any(re.fullmatch(known, name) for known in names.convolutions):
            raise UserError(f"layer {module!r} has the factors of a convolution, {tuple(down.shape)}, and {name!r} is "
                            "a linear layer; the file belongs to another model.")
    return layers


def _alpha(tensor: torch.Tensor, module: str) -> float:
    if tensor.numel() != 1 or not math.isfinite(alpha := float(tensor)) or alpha <= 0:
        raise UserError(f"layer {module!r}: alpha is {tensor.tolist()}, which is not one positive number; "
                        "the file is damaged.")
    return alpha


def _with_peft_scale(layer: LoraLayer, module: str, prefix: str, peft: Mapping[str, Any]) -> LoraLayer:
    """Scale as peft computes it from its configuration."""
    patterns = peft.get(f"{prefix}alpha_pattern") or {}
    alpha = peft.get(f"{prefix}lora_alpha", layer.rank)
    alpha = next((value for pattern, value in dict(patterns).items() if _peft_pattern(pattern, module)), alpha)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < MAX_ALPHA:
        raise UserError(f"layer {module!r}: alpha is {str(alpha)[:40]} in the metadata, which is not one positive "
                        "number; the file is damaged.")
    return replace(layer, alpha=float(alpha), use_rslora=bool(peft.get(f"{prefix}use_rslora", False)))


def _peft_pattern(pattern: str, module: str) -> bool:
    """Whether a key of ``alpha_pattern``, a regular expression for the end of a name, means this module."""
    # expressions of a stranger: none that could take for ever
    if len(pattern) > 1000 or len(re.findall(r"[*+?{]", pattern)) > 3 or re.search(r"\)[*+?{]", pattern):
        raise UserError(f"the pattern {pattern[:60]!r} for alpha in its metadata is too complicated to be trusted.")
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"the pattern {pattern[:60]!r} for alpha in its metadata is no regular expression ({error}); "
                        "the file is damaged.") from error
