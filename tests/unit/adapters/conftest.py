from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from diffsynth.adapters.lora import LoraLayer, LoraState
from diffsynth.models.registry import get_family
from diffsynth.models.spec import ModelFamily

TABLES = Path(__file__).parents[2] / "data" / "lora_keys"
TINY = dict(
    patch_size=1, in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
)


@pytest.fixture(scope="session")
def flux() -> ModelFamily:
    return get_family("flux")


def make_transformer(**changes) -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(**{**TINY, **changes})


@pytest.fixture
def transformer() -> torch.nn.Module:
    return make_transformer()


@pytest.fixture
def clip() -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=1, eos_token_id=2, projection_dim=16,
    ))


@pytest.fixture
def t5() -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    return T5EncoderModel(T5Config(
        vocab_size=50, d_model=24, d_kv=8, d_ff=48, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu",
    ))


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


def _tool(name: str) -> ModuleType:
    if str(TABLES) not in sys.path:
        sys.path.insert(0, str(TABLES))
    spec = importlib.util.spec_from_file_location(name, TABLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def check_lora() -> ModuleType:
    return _tool("check_lora")


@pytest.fixture(scope="session")
def delta_tool(check_lora) -> ModuleType:
    return _tool("delta")
