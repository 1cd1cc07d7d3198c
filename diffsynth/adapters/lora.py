"""LoRA on a network: put there for training, taken out for saving, loaded, fused, removed. The layers are peft's."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..core.errors import UserError
from ..core.random import keyed_generator
from ..models.spec import ModelFamily
from .files import load_lora_file, save_lora
from .formats import check_format
from .fused import fuse_lora, unfuse_lora
from .state import LoraLayer, LoraState
from .targets import adaptable_layers, resolve_targets

__all__ = [
    "LoraLayer", "LoraState", "add_lora_file", "apply_lora", "check_format", "clear_lora", "inject_lora",
    "load_lora_file", "load_lora_weights", "lora_state", "save_lora",
]

logger = logging.getLogger(__name__)

TRAINED_ADAPTER = "default"
_HOT_PREFIX = "hot_"


def inject_lora(
    module: torch.nn.Module,
    family: ModelFamily,
    targets: str | Sequence[str],
    rank: int,
    alpha: float | None = None,
    rslora: bool = False,
    dora: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    adapter_name: str = TRAINED_ADAPTER,
) -> list[str]:
    """Give layers of a network a LoRA to train; everything else is frozen.

    The initial values of a layer depend on the seed and its name only.

    Args:
        targets: Layer names separated by commas, or one regular expression; empty takes the family's usual layers.
        rank: Rank of both factors.
        alpha: The change is ``alpha / rank * B @ A``; default the rank.
        rslora: Scale by ``alpha / sqrt(rank)``. Source: arXiv:2312.03732.
        dora: Train magnitude and direction apart. Source: arXiv:2402.09353.
        dtype: Dtype of the trained factors.
    Returns:
        Full names of the layers.
    Raises:
        UserError: a target matches no layer, or a value is out of range.
    """
    if rank < 1:
        raise UserError(f"lora_rank must be at least 1, got {rank}.")
    alpha = float(rank) if alpha is None else float(alpha)
    if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"lora_alpha must be a positive number, got {alpha}.")
    names = resolve_targets(module, family, targets)
    _inject(module, names, adapter_name, rank, alpha, rslora, dora)
    module.requires_grad_(False)
    for name, layer in _adapted_layers(module, adapter_name).items():
        down, up = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        values = torch.empty(down.weight.shape, dtype=torch.float32)
        # peft's usual start: uniform with variance 1 / (3 fan_in), and up = 0
        bound = 1 / math.sqrt(values[0].numel())
        values.uniform_(-bound, bound, generator=keyed_generator(seed, "lora_init", name))
        _set(down, values, dtype)
        _set(up, torch.zeros(up.weight.shape), dtype)
        if dora:
            magnitude = layer.lora_magnitude_vector[adapter_name]
            magnitude.weight = torch.nn.Parameter(magnitude.weight.detach().to(dtype))
        for parameter in _adapter_parameters(layer, adapter_name):
            parameter.requires_grad_(True)
    logger.info("LoRA of rank %d, alpha %g on %d layers of %s", rank, alpha, len(names), type(module).__name__)
    return names


def lora_state(module: torch.nn.Module, adapter_name: str = TRAINED_ADAPTER) -> LoraState:
    """A copy, in float32 on the CPU, of the adapter that ``inject_lora`` put on a network."""
    adapted = _adapted_layers(module, adapter_name)
    rslora = bool(adapted) and module.peft_config[adapter_name].use_rslora  # type: ignore[union-attr, index]
    layers = {}
    for name, layer in adapted.items():
        magnitude = None
        if layer.use_dora.get(adapter_name):
            magnitude = _copy(layer.lora_magnitude_vector[adapter_name].weight)
        layers[name] = LoraLayer(
            _copy(layer.lora_A[adapter_name].weight), _copy(layer.lora_B[adapter_name].weight),
            float(layer.lora_alpha[adapter_name]), int(layer.r[adapter_name]),
            rslora, magnitude,
        )
    return LoraState(layers)


def load_lora_weights(
    module: torch.nn.Module,
    states: Mapping[str, LoraState] | LoraState,
    component: str = "dit",
    adapter_name: str = TRAINED_ADAPTER,
) -> None:
    """Start an injected adapter from a file's values; a different alpha in the file is folded in.

    Raises:
        UserError: layers or ranks differ.
    """
    state = states if isinstance(states, LoraState) else states.get(component, LoraState({}))
    layers = _adapted_layers(module, adapter_name)
    extra, absent = sorted(set(state.layers) - set(layers)), sorted(set(layers) - set(state.layers))
    if extra or absent:
        where = f"{extra[0]!r} is only in the file" if extra else f"{absent[0]!r} is not in the file"
        raise UserError(f"the LoRA checkpoint holds {len(state.layers)} layers of {component} and lora_target_modules "
                        f"means {len(layers)}: {where}; give the targets that the file was trained with.")
    for name, layer in layers.items():
        source = state.layers[name]
        down, up = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
        if source.down.shape != down.weight.shape or source.up.shape != up.weight.shape:
            raise UserError(f"layer {name!r} of the LoRA checkpoint has rank {source.rank} and shape {source.shape}; "
                            f"lora_rank {layer.r[adapter_name]} and this network need factors "
                            f"{tuple(down.weight.shape)} and {tuple(up.weight.shape)}.")
        if (source.dora_scale is not None) != bool(layer.use_dora.get(adapter_name)):
            raise UserError(f"the LoRA checkpoint is {'' if source.dora_scale is not None else 'not '}a DoRA; "
                            "set lora_dora to the same.")
        factor = source.scale / layer.scaling[adapter_name]
        with torch.no_grad():
            down.weight.copy_(source.down)
            up.weight.copy_(source.up if factor == 1 else source.up.float() * factor)
            if source.dora_scale is not None:
                layer.lora_magnitude_vector[adapter_name].weight.copy_(source.dora_scale.flatten())


def add_lora_file(
    module: torch.nn.Module,
    component: str,
    path: str | Path,
    family: ModelFamily,
    strength: float = 1.0,
    hot: bool = False,
    allow_unmatched: bool = False,
) -> None:
    """Load a LoRA file and add it to a network; what ``pipe.load_lora`` does.

    Args:
        allow_unmatched: Leave out layers of the file that do not exist here, with a warning, instead of refusing it.
    Raises:
        UserError: the file is not a LoRA of this network.
    """
    states = load_lora_file(path, family, allow_unmatched)
    if component not in states:
        raise UserError(f"LoRA file {path} holds no layers of {component}, only of {' and '.join(states)}.")
    others = [name for name in states if name != component]
    if others:
        logger.warning("LoRA file %s also holds layers of %s; load it into them as well to use those.", path, others)
    state = states[component]
    if allow_unmatched:
        present = adaptable_layers(module)
        absent = [name for name in state.layers if name not in present]
        if absent:
            logger.warning("LoRA file %s: ignored %d of %d layers of %s, which do not exist in it, for example %s.",
                           path, len(absent), len(state.layers), component, ", ".join(absent[:3]))
        state = replace(state, layers={name: layer for name, layer in state.layers.items() if name in present})
    try:
        changed = apply_lora(module, state, strength, "hot" if hot else "fused")
    except UserError as error:
        raise UserError(f"LoRA file {path}: {error}") from error
    logger.info("%s: changed %d of %d layers of %s", Path(path).name, changed, len(states[component].layers), component)


def apply_lora(
    module: torch.nn.Module,
    state: LoraState,
    strength: float = 1.0,
    mode: str = "fused",
    adapter_name: str | None = None,
) -> int:
    """Add a LoRA to a network; several may be added, each with its own strength.

    Args:
        strength: Factor of the change; 1 is as trained.
        mode: ``fused`` adds it to the weights (nothing costs time afterwards); ``hot`` keeps it beside them.
        adapter_name: Name of a hot adapter.
    Returns:
        How many layers act differently now: all of the LoRA's.
    Raises:
        UserError: a layer does not exist in the network, or has another shape there.
    """
    if mode not in ("fused", "hot"):
        raise ValueError(f"mode must be 'fused' or 'hot', got {mode!r}.")
    if not math.isfinite(strength):
        raise UserError(f"the strength of a LoRA must be a finite number, got {strength}.")
    layers = adaptable_layers(module)
    for name, layer in state.layers.items():
        if name not in layers:
            raise UserError(f"layer {name!r} does not exist in this {type(module).__name__}, which has "
                            f"{len(layers)} linear layers; the LoRA is of a larger or another model.")
        if tuple(layers[name].weight.shape) != layer.shape:
            raise UserError(f"layer {name!r} changes a weight of shape {layer.shape}, and here it has "
                            f"{tuple(layers[name].weight.shape)}; the LoRA is of another model.")
    if mode == "fused":
        fuse_lora(module, layers, state, strength)
        return len(state.layers)
    return _apply_hot(module, state, strength, adapter_name)


def clear_lora(module: torch.nn.Module) -> None:
    """Undo every ``apply_lora``: fused weights are restored bit for bit, hot adapters are removed."""
    unfuse_lora(module, adaptable_layers(module))
    hot = module.__dict__.pop("_diffsynth_hot_adapters", [])
    if not hot:
        return
    for parent_name, child_name, layer in list(_tuner_layers(module)):
        for name in hot:
            if name in layer.lora_A:
                layer.delete_adapter(name)
        if not layer.lora_A:
            setattr(module.get_submodule(parent_name), child_name, layer.get_base_layer())
        else:
            _activate(layer)
    for name in hot:
        getattr(module, "peft_config", {}).pop(name, None)


def _apply_hot(module: torch.nn.Module, state: LoraState, strength: float, adapter_name: str | None) -> int:
    hot: list[str] = module.__dict__.setdefault("_diffsynth_hot_adapters", [])
    name = adapter_name or f"{_HOT_PREFIX}{len(hot)}"
    if name in hot or _adapted_layers(module, name):
        raise ValueError(f"adapter {name!r} is already on this network.")
    trainable = {key: parameter.requires_grad for key, parameter in module.named_parameters()}
    groups: dict[tuple, list[str]] = {}
    for key, layer in state.layers.items():
        groups.setdefault((layer.rank, layer.alpha, layer.use_rslora, layer.dora_scale is not None), []).append(key)
    for (rank, alpha, rslora, dora), keys in groups.items():
        _inject(module, keys, name, rank, alpha, rslora, dora)
    hot.append(name)
    adapted = _adapted_layers(module, name)
    assert adapted.keys() == state.layers.keys(), "peft gave adapters to other layers than it was told"
    for key, layer in adapted.items():
        source = state.layers[key]
        dtype = layer.get_base_layer().weight.dtype
        dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
        _set(layer.lora_A[name], source.down, dtype)
        _set(layer.lora_B[name], source.up, dtype)
        if source.dora_scale is not None:
            magnitude = layer.lora_magnitude_vector[name]
            magnitude.weight = torch.nn.Parameter(source.dora_scale.flatten().to(magnitude.weight.device, dtype))
        layer.scaling[name] = source.scale * strength
        for parameter in _adapter_parameters(layer, name):
            parameter.requires_grad_(False)
    for key, parameter in module.named_parameters():
        before = key.replace(".base_layer.", ".")
        parameter.requires_grad_(trainable.get(key, trainable.get(before, False)))
    return len(adapted)


def _inject(
    module: torch.nn.Module, names: Sequence[str], adapter_name: str, rank: int, alpha: float, rslora: bool, dora: bool
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=rslora, use_dora=dora,  # type: ignore[arg-type]
        # one expression of whole names: peft would read a list as ends of names, and "proj_out" ends others too
        target_modules=f"({'|'.join(re.escape(name) for name in names)})",
    )
    # peft draws initial values of its own, which are replaced; the global generator must not notice
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are meant
        inject_adapter_in_model(config, module, adapter_name)
    for _, _, layer in _tuner_layers(module):
        _activate(layer)


def _activate(layer: Any) -> None:
    """All adapters of a layer act together; what is trained stays as it is."""
    trainable = {key: parameter.requires_grad for key, parameter in layer.named_parameters()}
    layer.set_adapter(list(layer.lora_A))
    for key, parameter in layer.named_parameters():
        parameter.requires_grad_(trainable[key])


def _tuner_layers(module: torch.nn.Module) -> list[tuple[str, str, Any]]:
    """(name of the parent, name in it, layer) of every layer with adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [
        (name.rpartition(".")[0], name.rpartition(".")[2], layer)
        for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)
    ]


def _adapted_layers(module: torch.nn.Module, adapter_name: str) -> dict[str, Any]:
    return {
        f"{parent}.{child}" if parent else child: layer
        for parent, child, layer in _tuner_layers(module) if adapter_name in layer.lora_A
    }


def _adapter_parameters(layer: Any, adapter_name: str) -> list[torch.nn.Parameter]:
    return [
        parameter for key, parameter in layer.named_parameters()
        if key.split(".")[0].startswith("lora_") and key.split(".")[1] == adapter_name
    ]


def _set(factor: Any, values: torch.Tensor, dtype: torch.dtype) -> None:
    factor.weight = torch.nn.Parameter(values.detach().to(factor.weight.device, dtype, copy=True))


def _copy(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)
