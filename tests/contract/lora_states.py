"""Random adapters for a family's denoiser, and commands on their files."""

from __future__ import annotations

import torch

from diffsynth.adapters.formats import FORMATS
from diffsynth.adapters.names import family_names
from diffsynth.adapters.state import LoraLayer, LoraState
from diffsynth.adapters.targets import adaptable_layers
from diffsynth.cli import dispatch

from .tiny import FamilyAtWork

RANK, ALPHA = 4, 10.0


def random_layer(shape: tuple[int, ...], rank: int, alpha: float, seed: int = 0) -> LoraLayer:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator) / 10
    return LoraLayer(down, torch.randn(shape[0], rank, generator=generator) / 10, alpha, rank)


def named_everywhere(family: FamilyAtWork, component: str, network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Linear layers that have a name in every format, and their shapes."""
    names = family_names(family.family).components[component]
    return {name: tuple(layer.weight.shape) for name, layer in adaptable_layers(network).items()
            if isinstance(layer, torch.nn.Linear) and all(names.file_match(name, fmt) for fmt in FORMATS)}


def random_state(
    shapes: dict[str, tuple[int, ...]], rank: int = RANK, alpha: float = ALPHA, seed: int = 0
) -> LoraState:
    return LoraState({name: random_layer(shape, rank, alpha, seed + index)
                      for index, (name, shape) in enumerate(shapes.items())})


def same(first: dict[str, LoraState], second: dict[str, LoraState]) -> None:
    """Largest element of the difference of any layer's change is at most 1e-6."""
    assert first.keys() == second.keys()
    for component, state in first.items():
        assert state.layers.keys() == second[component].layers.keys()
        for name, layer in state.layers.items():
            worst = float((layer.delta() - second[component].layers[name].delta()).abs().max())
            assert worst <= 1e-6, (name, worst)


def command(*words: object) -> None:
    dispatch([str(word) for word in words])
