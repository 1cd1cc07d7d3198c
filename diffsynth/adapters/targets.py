"""Which layers of a network a user means: names as ends of names, a regular expression, or names of older pages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch

from ..core.errors import UserError, did_you_mean
from ..models.spec import ModelFamily
from .names import ComponentNames, family_names

AdaptableLayer = torch.nn.Linear | torch.nn.Conv2d

_REGEX_SIGNS = re.compile(r"[\\^$*+?\[\](){}|]")


def adaptable_layers(module: torch.nn.Module) -> dict[str, AdaptableLayer]:
    """Every linear layer and convolution by its name without adapters around it."""
    layers: dict[str, AdaptableLayer] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, AdaptableLayer) and not _inside_adapter(name):
            layers[name.removesuffix(".base_layer")] = layer
    return layers


def _inside_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def resolve_targets(module: torch.nn.Module, family: ModelFamily, targets: str | Sequence[str]) -> list[str]:
    """Full names of the layers that ``targets`` mean, in the network's order.

    Args:
        targets: Names separated by commas (each matches every layer that is called so or ends so), or one regular
            expression for the whole name; empty takes the family's usual layers. A list that holds one layer name of
            the older generation, or of the authors' code, is read in those names throughout.
    Raises:
        UserError: a target matches no layer.
    """
    layers = list(adaptable_layers(module))
    wanted = _split(targets) or list(family.default_lora_targets)
    matches = {target: [name for name in layers if _matches(name, target)] for target in wanted}
    if not all(matches.values()):
        aliases = _older_names(layers, family)
        older = {target: _match_older(layers, target, aliases, family) for target in wanted}
        if any(older[target] for target in wanted if not matches[target]):
            matches = {target: older[target] or matches[target] for target in wanted}
    unmatched = [target for target in wanted if not matches[target]]
    if unmatched:
        available = _short_names(layers)
        listed = ", ".join(repr(target) for target in unmatched)
        suggestion = did_you_mean(unmatched[0].rpartition(".")[2], [name.rpartition(".")[2] for name in available]) or \
            did_you_mean(unmatched[0], available)
        raise UserError(f"lora_target_modules {listed} matches no linear layer of {type(module).__name__}; it has for "
                        f"example {', '.join(available[:8])}.{suggestion}")
    chosen = {name for names in matches.values() for name in names}
    return [name for name in layers if name in chosen]


def _split(targets: str | Sequence[str]) -> list[str]:
    if not isinstance(targets, str):
        return [target for target in targets if target]
    if _REGEX_SIGNS.search(targets):
        return [targets.strip()]
    return [target.strip() for target in targets.split(",") if target.strip()]


def _matches(name: str, target: str) -> bool:
    if name == target or name.endswith(f".{target}"):
        return True
    if not _REGEX_SIGNS.search(target):
        return False
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise UserError(f"lora_target_modules {target!r} is not a valid regular expression: {error}.") from error


def _older_names(layers: Iterable[str], family: ModelFamily) -> dict[str, list[str]]:
    """Our layer -> its names in the other layouts of the family."""
    aliases: dict[str, list[str]] = {}
    components: list[ComponentNames] = list(family_names(family).components.values())
    tables = [table for names in components for table in (names.diffsynth, names.original) if table]
    for name in layers:
        found = [match.original for table in tables if (match := table.match_ours(name))]
        aliases[name] = found
    return aliases


def _match_older(
    layers: Iterable[str], target: str, aliases: dict[str, list[str]], family: ModelFamily
) -> list[str]:
    meant = family.lora_aliases.get(target, ())
    return [
        name for name in layers
        if any(_matches(alias, target) for alias in aliases[name]) or any(_matches(name, ours) for ours in meant)
    ]


def _short_names(layers: Iterable[str]) -> list[str]:
    """Names within a block, each once: ``attn.to_q`` for ``transformer_blocks.0.attn.to_q``."""
    return list(dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name) for name in sorted(layers, key=lambda n: n.count("."))))
