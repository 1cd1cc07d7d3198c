"""A LoRA from the difference of two models: the base, and one that was trained in full from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ..core.errors import UserError
from ..models.building import build_empty
from ..models.keymap import Match, to_original
from ..models.spec import ModelFamily
from .arithmetic import Kept, low_rank
from .base_weights import BaseFile, BaseNetwork
from .names import family_names
from .state import LoraLayer, LoraState, unfuse

Progress = Callable[[Sequence[str]], Iterable[str]]


@dataclass
class Extracted:
    """A LoRA and how much of the difference is in it."""

    states: dict[str, LoraState]
    kept: dict[str, Kept] = field(default_factory=dict)
    """Layer, as the file will call it -> share of the squared norm of its difference."""
    others: dict[str, float] = field(default_factory=dict)
    """Weights that differ and that no LoRA can change -> squared norm of the difference."""
    num_equal: int = 0
    """Linear layers without a difference, which are left out."""


def extract_lora(
    base: Sequence[BaseFile], tuned: Sequence[BaseFile], family: ModelFamily, fmt: str, rank: int,
    ignore_other_changes: bool = False, device: torch.device | str = "cpu", progress: Progress = iter,
) -> Extracted:
    """The LoRA of this rank that is nearest to what training changed.

    Each layer of the file is one low-rank matrix: where a format keeps several of our layers in one weight (q, k and
    v), they share its rank.

    Args:
        base: Files of the model before training, in any layout.
        tuned: Files of the model after it, in any layout.
        fmt: Format that the LoRA will be written in.
        rank: Rank of each layer in that file.
        ignore_other_changes: Leave out changed norms, biases, embeddings and convolutions instead of refusing.
        device: Where singular values are computed.
    Raises:
        UserError: the models are not of one shape, nothing differs, or something differs that no LoRA can change.
    """
    networks = _pairs(base, tuned)
    extracted = Extracted({})
    groups: dict[str, tuple[BaseNetwork, BaseNetwork, Match]] = {}
    for before, after in networks:
        _compare_shapes(before, after)
        groups |= _file_layers(before, after, family, fmt, extracted)
    if extracted.others and not ignore_other_changes:
        raise UserError(f"{len(extracted.others)} changed weights are no linear layers, for example "
                        f"{', '.join(list(extracted.others)[:3])}; a LoRA cannot hold them. "
                        "--ignore_other_changes leaves them out.")
    for name in progress(list(groups)):
        before, after, match = groups[name]
        layers = _extract_layer(name, before, after, match, rank, device, extracted)
        state = extracted.states.setdefault(before.component, LoraState({}, {}, before.component))
        state.layers.update(layers)
    extracted.states = {component: state for component, state in extracted.states.items() if state.layers}
    if not extracted.states:
        raise UserError("the two models have the same linear layers; there is nothing to extract.")
    return extracted


def _pairs(base: Sequence[BaseFile], tuned: Sequence[BaseFile]) -> list[tuple[BaseNetwork, BaseNetwork]]:
    before = {network.component: network for file in base for network in file.networks}
    after = {network.component: network for file in tuned for network in file.networks}
    common = [name for name in before if name in after]
    if not common:
        raise UserError(f"the models have no network in common: the base holds {', '.join(before)}, the other "
                        f"{', '.join(after)}.")
    return [(before[name], after[name]) for name in common]


def _compare_shapes(before: BaseNetwork, after: BaseNetwork) -> None:
    tied = {*before.found.spec.tied, *before.found.spec.tied.values()}  # files hold either, or both
    different = sorted((before.places.keys() ^ after.places.keys()) - tied)
    if different:
        where = "base" if different[0] in before.places else "other model"
        raise UserError(f"{different[0]!r} of {before.component} is only in the {where}; these are different models.")
    for name in before.places.keys() & after.places.keys():
        if before.shape(name) != after.shape(name):
            raise UserError(f"{name!r} of {before.component} has shape {before.shape(name)} in the base and "
                            f"{after.shape(name)} in the other model; these are different models.")


def _file_layers(
    before: BaseNetwork, after: BaseNetwork, family: ModelFamily, fmt: str, extracted: Extracted
) -> dict[str, tuple[BaseNetwork, BaseNetwork, Match]]:
    """Layers that the file may have, by their names there; notes what differs and cannot be among them."""
    names = family_names(family).components.get(before.component)
    linear = set() if names is None else _linear_layers(before)
    groups: dict[str, tuple[BaseNetwork, BaseNetwork, Match]] = {}
    for name in before.places:
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in linear and names is not None:
            match = names.file_match(module, fmt)
            if match is not None:
                groups[names.file_name(match, fmt)] = (before, after, match)
                continue
            if _difference(before, after, name).any():
                raise UserError(f"{module!r} of {before.component} differs and has no name in the {fmt} format; use "
                                "another --format.")
        elif (norm := float(_difference(before, after, name).square().sum())) > 0:
            extracted.others[f"{before.component}: {name}"] = norm
    return groups


def _linear_layers(network: BaseNetwork) -> set[str]:
    module = build_empty(network.found.spec, network.found.config)
    return {name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}


def _difference(before: BaseNetwork, after: BaseNetwork, name: str) -> torch.Tensor:
    return after.get(name) - before.get(name)


def _extract_layer(
    name: str, before: BaseNetwork, after: BaseNetwork, match: Match, rank: int, device: torch.device | str,
    extracted: Extracted,
) -> dict[str, LoraLayer]:
    parts = [_difference(before, after, f"{module}.weight") for module in match.ours]
    change = to_original(match.rule, parts)
    if not bool(change.any()):
        extracted.num_equal += len(parts)
        return {}
    if not bool(change.isfinite().all()):
        raise UserError(f"layer {name!r} differs by values that are not finite; one of the models is damaged.")
    layer, kept = low_rank(change.to(device), rank, name)
    extracted.kept[name] = kept
    return unfuse(match, layer)
