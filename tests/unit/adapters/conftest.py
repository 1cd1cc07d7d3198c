from __future__ import annotations

from types import ModuleType

import pytest
import torch
from lora_networks import make_transformer

from diffsynth.models.registry import get_family
from diffsynth.models.spec import ModelFamily
from tests.recorded_names import tool


@pytest.fixture(scope="session")
def flux() -> ModelFamily:
    return get_family("flux")


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


@pytest.fixture(scope="session")
def check_lora() -> ModuleType:
    return tool("check_lora")


@pytest.fixture(scope="session")
def delta_tool(check_lora) -> ModuleType:
    return tool("delta")
