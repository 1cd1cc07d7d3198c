"""From files to networks, and back."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import UserError, did_you_mean
from ..core.loader.config import ModelConfig
from ..core.loader.files import weight_groups
from ..core.loader.reader import WeightReader
from ..core.loader.writer import save_safetensors
from .building import build_empty, stream_weights
from .recognition import Found, assign_weights, describe_unknown, find_components
from .registry import all_component_specs
from .spec import Component, ComponentSpec, ModelFamily

logger = logging.getLogger(__name__)

ModelSource = ModelConfig | str | Path | Sequence[str | Path]


@dataclass(frozen=True, kw_only=True)
class LoadedComponent:
    """A network and where it came from. On the network itself as ``module._diffsynth_source``, without ``module``."""

    module: nn.Module | None
    spec: ComponentSpec
    name: str
    paths: tuple[Path, ...]
    fingerprint: str
    """Content of the files, kind of network and configuration; changes whenever its outputs might."""
    config: dict[str, Any]


@dataclass
class _Located:
    """A network that was found in an open file."""

    found: Found
    others: list[Found]
    reader: WeightReader
    stray: list[str]
    """Weights of the file that belong to none of the networks found in it."""


def load_component(path_or_paths: ModelSource, name: str | None = None, torch_dtype: torch.dtype | None = None,
                   device: torch.device | str = "cpu") -> nn.Module:
    """Load one network from its file, whatever layout it is in.

    Args:
        path_or_paths: A weight file, a folder, the list of the shards, or a ``ModelConfig``.
        name: Which network, where the file holds several: ``dit``, ``vae``, ``text_encoder``, ...
        torch_dtype: Dtype of the weights. Default float32.
        device: Where the weights go, one after the other.
    Returns:
        The diffusers or transformers class, in eval mode.
    Raises:
        UserError: the file is unreadable, not recognised or incomplete, or holds no or several such networks.
    """
    specs = all_component_specs()
    with ExitStack() as stack:
        located = [place for reader in _open_all([path_or_paths], stack)
                   for place in _locate(reader, specs, None, required=True)]
        if name is not None:
            chosen = [place for place in located if name in (place.found.spec.default_name, place.found.spec.kind)]
        else:
            chosen = located
        held = ", ".join(place.found.spec.default_name for place in located)
        if len(chosen) != 1:
            wanted = f"{len(chosen) or 'no'} networks called {name!r}" if name is not None else "several networks"
            raise UserError(f"{_show(path_or_paths)} holds {wanted}; it holds {held}. "
                            "Say which one with name=, or give its own file.")
        return _load(chosen[0], chosen[0].found.spec.default_name, torch_dtype, device).module  # type: ignore[return-value]


def load_components(configs: Iterable[ModelSource], family: ModelFamily, torch_dtype: torch.dtype | None = None,
                    device: torch.device | str = "cpu", names: set[str] | None = None,
                    deferred: Collection[str] = ()) -> dict[str, LoadedComponent]:
    """Load the networks of a family from any set of files; each file is recognised by what is in it.

    Args:
        names: Load only these; the others need not be there.
        deferred: Find and check these as well, but leave their weights on the disk (``module`` is None).
    Returns:
        Name on the pipeline -> network, in the family's order.
    Raises:
        UserError: a required network is in none of the files (says which file would bring it), is in two of them, or
            a file holds nothing that this family uses (says what it seems to be).
    """
    by_kind = {component.spec.kind: component for component in family.components}
    wanted = _wanted(family, names)
    specs = [component.spec for component in family.components]
    constants = {component.spec.kind: component.constants for component in family.components}
    with ExitStack() as stack:
        places: dict[str, _Located] = {}
        for reader in _open_all(configs, stack):
            for place in _locate(reader, specs, constants, family=family):
                component = by_kind[place.found.spec.kind]
                if component.name in places:
                    raise UserError(f"{component.name} of {family.name} is both in "
                                    f"{places[component.name].reader.describe()} and in {reader.describe()}; "
                                    "give only one of them.")
                places[component.name] = place
        for component in wanted:
            if component.name not in places and not component.optional:
                raise _missing(component, family, places)
        return {
            name: _describe(places[name], name) if name in deferred else _load(places[name], name, torch_dtype, device)
            for name in (component.name for component in wanted) if name in places
        }


def _missing(component: Component, family: ModelFamily, places: dict[str, _Located]) -> UserError:
    given = ", ".join(f"{name} from {place.reader.describe()}" for name, place in places.items())
    rest = next((f" {place.reader.describe()} also holds other weights: "
                 f"{describe_unknown(dict.fromkeys(place.stray))}." for place in places.values() if place.stray), "")
    return UserError(f"{family.name} needs {component.name}, which none of the files holds "
                     f"(found: {given or 'nothing'}); add {component.found_in}.{rest}")


def _wanted(family: ModelFamily, names: set[str] | None) -> list[Component]:
    known = [component.name for component in family.components]
    for name in names or ():
        if name not in known:
            raise UserError(f"{family.name} has no component {name!r}; it has {', '.join(known)}."
                            f"{did_you_mean(name, known)}")
    return [component for component in family.components if names is None or component.name in names]


def _open_all(sources: Iterable[ModelSource], stack: ExitStack) -> list[WeightReader]:
    groups: dict[tuple[Path, ...], None] = {}
    for source in sources:
        paths: Any = source
        if isinstance(source, ModelConfig):
            paths = source.resolve()
            paths = paths[0] if len(paths) == 1 else paths
        for group in weight_groups(paths):
            groups[tuple(group)] = None
    return [stack.enter_context(WeightReader(group)) for group in groups]


def _locate(reader: WeightReader, specs: Sequence[ComponentSpec], constants: Any, family: ModelFamily | None = None,
            required: bool = True) -> list[_Located]:
    found = find_components(reader, specs, constants)
    if not found and family is not None:
        foreign = find_components(reader, all_component_specs())
        if foreign:
            kinds = ", ".join(component.spec.kind for component in foreign)
            raise UserError(f"{reader.describe()} holds {kinds}, which {family.name} does not use; "
                            "give the files of one family only.")
    if not found and required:
        user = f"{family.name} can use" if family is not None else "is known"
        raise UserError(f"{reader.describe()} holds no network that {user}; {describe_unknown(reader.tensors)}.")
    stray = assign_weights(reader.tensors, found, [component.expected_names() for component in found])
    return [_Located(component, found, reader, stray) for component in found]


def _describe(place: _Located, name: str) -> LoadedComponent:
    found, reader = place.found, place.reader
    _check_complete(found, reader)
    settings = json.dumps(found.config, sort_keys=True, default=str)
    return LoadedComponent(module=None, spec=found.spec, name=name, paths=tuple(reader.paths), config=found.config,
                           fingerprint=f"{found.spec.kind}:{reader.fingerprint()}:{settings}")


def _load(place: _Located, name: str, torch_dtype: torch.dtype | None, device: torch.device | str) -> LoadedComponent:
    found, reader = place.found, place.reader
    module = build_empty(found.spec, found.config)
    expected = [module.state_dict().keys() if other is found else other.expected_names() for other in place.others]
    assign_weights(reader.tensors, place.others, expected)
    if place.stray:
        logger.warning("%s: %d weights belong to no known network, for example %s.", reader.describe(),
                       len(place.stray), place.stray[:3])
    loaded = _describe(place, name)
    stream_weights(module, found, reader, _safe_dtype(found.spec, torch_dtype or torch.float32), device)
    module._diffsynth_source = loaded  # type: ignore[assignment]
    return replace(loaded, module=module)


def _safe_dtype(spec: ComponentSpec, torch_dtype: torch.dtype) -> torch.dtype:
    """The asked dtype, or a safe one where the network overflows in it; storage dtypes below 16 bits pass."""
    name = str(torch_dtype).removeprefix("torch.")
    if torch_dtype.itemsize < 2 or name in spec.safe_dtypes:
        return torch_dtype
    logger.info("%s is kept in %s: it overflows in %s.", spec.kind, spec.safe_dtypes[0], name)
    return getattr(torch, spec.safe_dtypes[0])


def _check_complete(found: Found, reader: WeightReader) -> None:
    problems = []
    if found.missing:
        problems.append(f"lacks {len(found.missing)} weights of {found.spec.kind}, for example {found.missing[:3]}")
    if found.unexpected:
        problems.append(f"has {len(found.unexpected)} weights too many, for example {found.unexpected[:3]}")
    if problems:
        raise UserError(f"{reader.describe()} {' and '.join(problems)}; "
                        "the file is incomplete or of another version of this model.")


def _show(source: ModelSource) -> str:
    if isinstance(source, ModelConfig):
        return str(source.path or f"{source.model_id}:{source.origin_file_pattern}")
    return str(source) if isinstance(source, (str, Path)) else ", ".join(str(path) for path in source)


def save_component(module: nn.Module, path: Path | str, spec: ComponentSpec, layout: str = "original",
                   torch_dtype: torch.dtype | None = None) -> Path:
    """Write a network to one file, with its configuration in the metadata.

    Args:
        layout: ``original`` (the authors' names, where the network has such) or ``diffusers``.
        torch_dtype: Dtype of the file. Default that of the weights.
    """
    config = module_config(module)
    tensors = {key: value.detach() for key, value in module.state_dict().items() if key not in spec.tied}
    if torch_dtype is not None:
        tensors = {key: value.to(torch_dtype) if value.is_floating_point() else value for key, value in tensors.items()}
    chosen = [candidate for candidate in spec.layouts if candidate.name == layout]
    if layout not in ("original", "diffusers"):
        raise UserError(f"layout must be original or diffusers, got {layout!r}.")
    if chosen and chosen[0].key_map is not None:
        tensors = chosen[0].key_map(config).to_original(tensors)
    described = {"_class_name": type(module).__name__, **config}
    return save_safetensors(path, tensors, {"config": json.dumps(described, sort_keys=True)})


def module_config(module: nn.Module) -> dict[str, Any]:
    """The configuration a network was built with, JSON-able."""
    config: Any = module.config
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {key: value for key, value in json.loads(json.dumps(plain, default=str)).items()
            if not key.startswith("_") and value is not None}
