"""Tiny networks and random adapters for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from diffsynth.adapters.lora import LoraLayer, LoraState

TABLES = Path(__file__).parents[2] / "data" / "lora_keys"
TINY = dict(
    patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
)


def make_transformer(**changes) -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(**{**TINY, **changes})


def randomise(module: torch.nn.Module, seed: int = 1) -> None:
    """Values for both factors, as training would leave them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def random_state(shapes: dict[str, tuple[int, ...]], rank: int | Callable[[str], int], alpha: float = 6.0) -> LoraState:
    generator = torch.Generator().manual_seed(5)
    layers = {}
    for name, (rows, columns) in shapes.items():
        r = rank if isinstance(rank, int) else rank(name)
        layers[name] = LoraLayer(torch.randn(r, columns, generator=generator) * 0.1,
                                 torch.randn(rows, r, generator=generator) * 0.1, alpha, r)
    return LoraState(layers)


def linear_shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(layer.weight.shape) for name, layer in module.named_modules()
            if isinstance(layer, torch.nn.Linear)}


def assert_same_deltas(first: LoraState, second: LoraState, tolerance: float = 1e-6) -> None:
    assert first.layers.keys() == second.layers.keys()
    for name, layer in first.layers.items():
        torch.testing.assert_close(layer.delta(), second.layers[name].delta(), atol=tolerance, rtol=0, msg=name)
