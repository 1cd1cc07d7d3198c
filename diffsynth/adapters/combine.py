"""Whole adapters made smaller and added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..core.errors import UserError
from ..models.spec import ModelFamily
from .arithmetic import Kept, resize_layer, weighted_sum
from .files import LoraFile
from .formats import map_layers
from .state import LoraLayer, LoraState


def resize_states(
    states: Mapping[str, LoraState], family: ModelFamily, fmt: str, rank: int | None, keep: float | None, path: Path
) -> tuple[dict[str, LoraState], dict[str, Kept]]:
    """Adapters with the nearest lower-rank change of each layer as it was trained, and what that kept.

    Args:
        rank: The new rank, or None when ``keep`` is given (see ``arithmetic.resize_layer``).
        path: Of what the adapters come from, for messages.
    Raises:
        UserError: no layer has a higher rank already.
    """
    kept: dict[str, Kept] = {}
    ranks: list[int] = []

    def smaller(name: str, layer: LoraLayer) -> LoraLayer:
        ranks.append(layer.rank)
        resized, kept[name] = resize_layer(layer, rank, keep)
        return resized

    resized = map_layers(states, family, fmt, smaller)
    if rank is not None and rank >= max(ranks):
        raise UserError(f"{path} has rank {max(ranks)} at most, so that --rank {rank} would change nothing; give a "
                        "lower one.")
    return resized, kept


def sum_states(files: Sequence[tuple[LoraFile, float]]) -> dict[str, LoraState]:
    """The weighted sum of the changes of several files.

    Raises:
        UserError: two change one layer in different shapes.
    """
    terms: dict[str, dict[str, list[tuple[LoraLayer, float]]]] = {}
    for file, weight in files:
        for component, state in file.states.items():
            for name, layer in state.layers.items():
                others = terms.setdefault(component, {}).setdefault(name, [])
                if others and others[0][0].shape != layer.shape:
                    raise UserError(f"{file.path} changes {name!r} of {component} in the shape {layer.shape}, and "
                                    f"another file in {others[0][0].shape}; they are of different models.")
                others.append((layer, weight))
    return {component: LoraState({name: weighted_sum(parts) for name, parts in layers.items()}, {}, component)
            for component, layers in terms.items()}
