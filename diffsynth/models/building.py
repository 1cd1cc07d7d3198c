"""Building a network on the meta device and streaming weights into it, so that memory holds the model once."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..core.errors import UserError
from ..core.loader.reader import WeightReader
from .keymap import shapes_to_ours
from .recognition import Found
from .spec import ComponentSpec

# what layers allocate their weights with; arange, tensor and the like fill small buffers and stay real
_ALLOCATORS = frozenset({torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full})


class _WeightsOnMeta(TorchFunctionMode):
    """Weights cost nothing while a network is constructed, buffers that no file holds get their values."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _ALLOCATORS and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_empty(spec: ComponentSpec, config: Mapping[str, Any]) -> nn.Module:
    """The network with its weights on the meta device, in eval mode.

    Raises:
        UserError: the class does not accept this configuration.
    """
    network_class = spec.load_class()
    try:
        with _WeightsOnMeta():
            module = _construct(network_class, config, spec.arguments)
    except (TypeError, ValueError, KeyError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(f"{network_class.__name__} cannot be built from the configuration {dict(config)}: "
                        f"{error}") from error
    return module.eval()


def _construct(network_class: Any, config: Mapping[str, Any], arguments: Mapping[str, Any]) -> nn.Module:
    config_class = getattr(network_class, "config_class", None)
    if config_class is not None:  # transformers
        known = _config_fields(config_class)
        described = config_class(**{name: value for name, value in config.items() if name in known})
        return network_class(described, **arguments)
    accepted = inspect.signature(network_class.__init__).parameters
    return network_class(**{name: value for name, value in config.items() if name in accepted}, **arguments)


def _config_fields(config_class: type) -> set[str]:
    """What describes this network, without what every configuration may hold: from a foreign ``config.json``,
    ``attn_implementation`` would fetch code from a hub and ``num_labels`` fill the memory."""
    own = itertools.takewhile(lambda base: base.__module__ != "transformers.configuration_utils", config_class.__mro__)
    return {name for base in own for name in inspect.get_annotations(base)} | {"tie_word_embeddings"}


def stream_weights(module: nn.Module, found: Found, reader: WeightReader, torch_dtype: torch.dtype,
                   device: torch.device | str) -> None:
    """Read, convert and assign one tensor of the file after the other.

    Raises:
        UserError: a weight has another shape than the network.
    """
    targets: dict[str, torch.Tensor] = {**dict(module.named_parameters(remove_duplicate=False)),
                                        **dict(module.named_buffers(remove_duplicate=False))}
    keep_float32 = _float32_names(module, torch_dtype)
    tied = {**found.spec.tied, **{second: first for first, second in found.spec.tied.items()}}
    for key, match in found.sources.items():
        info = reader.tensors[key]
        shapes = shapes_to_ours(match.rule, info.shape)
        first_row = 0
        for ours, shape in zip(match.ours, shapes, strict=True):
            if shape != targets[ours].shape:
                raise UserError(f"weight {key!r} of {reader.describe()} has shape {shape} for {ours!r}, "
                                f"but {type(module).__name__} needs {tuple(targets[ours].shape)}; the file or the "
                                "configuration beside it belongs to another model.")
            dtype = torch.float32 if any(name in ours.split(".") for name in keep_float32) else torch_dtype
            as_stored = tuple(reversed(shape)) if match.rule.transpose else shape
            tensor = torch.empty(as_stored, dtype=dtype if info.dtype.is_floating_point else info.dtype, device=device)
            reader.read_rows(key, first_row, tensor)
            first_row += shape[0] if shape else 0
            if match.rule.transpose:
                tensor = tensor.t().contiguous()
            if match.rule.swap_halves:
                tensor = torch.cat(list(reversed(tensor.chunk(2, dim=0))), dim=0)
            _assign(module, [ours, tied[ours]] if ours in tied else [ours], tensor)
    for name in found.spec.identity:
        if targets[name].is_meta and not any(name in match.ours for match in found.sources.values()):
            _assign(module, [name], torch.eye(*targets[name].shape, dtype=torch_dtype, device=device))
    _finish_buffers(module, device)


def _assign(module: nn.Module, names: list[str], tensor: torch.Tensor) -> None:
    """Put one tensor in the place of a weight, or of two that are tied."""
    value: torch.Tensor | None = None
    for name in names:
        owner_name, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        if leaf in owner._parameters:
            old = owner._parameters[leaf]
            assert old is not None
            if value is None:
                value = nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())
            owner._parameters[leaf] = value  # type: ignore[assignment]
        else:
            owner._buffers[leaf] = tensor


def _finish_buffers(module: nn.Module, device: torch.device | str) -> None:
    for owner in module.modules():
        for leaf, buffer in owner._buffers.items():
            if buffer is not None:
                assert not buffer.is_meta, f"{type(owner).__name__}.{leaf} has no value after loading"
                owner._buffers[leaf] = buffer.to(device)
    for name, parameter in module.named_parameters():
        assert not parameter.is_meta, f"{name} has no value after loading"


def _float32_names(module: nn.Module, torch_dtype: torch.dtype) -> set[str]:
    """Layers that the class itself keeps in float32 when the rest is halved, as ``from_pretrained`` does."""
    if torch_dtype not in (torch.float16, torch.bfloat16):
        return set()
    names = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    transformers = hasattr(module, "_keep_in_fp32_modules_strict")
    if torch_dtype == torch.float16 or not transformers:
        names |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return names
