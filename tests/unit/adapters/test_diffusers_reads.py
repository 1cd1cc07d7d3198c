"""What ``diffusers.FluxPipeline.load_lora_weights`` makes of our files."""

from __future__ import annotations

import logging

import pytest
import torch
from lora_networks import linear_shapes, make_transformer, random_state, randomise

from diffsynth.adapters.lora import LoraState, inject_lora, lora_state, save_lora


def pipeline(transformer: torch.nn.Module, text_encoder: torch.nn.Module | None = None):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=text_encoder, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer,
    )


def load(pipe, path, caplog) -> None:
    """Load with every warning of diffusers recorded."""
    import diffusers.utils.logging as diffusers_logging

    diffusers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights(path, adapter_name="ours")
    diffusers_logging.disable_propagation()


def assert_nothing_unmatched(caplog) -> None:
    for phrase in ("led to unexpected keys", "led to missing keys", "Unsupported keys"):
        assert phrase not in caplog.text


def assert_same_changes(module: torch.nn.Module, state: LoraState) -> None:
    found = {}
    for name, layer in module.named_modules():
        if hasattr(layer, "lora_A") and "ours" in layer.lora_A:
            found[name] = layer
    assert found.keys() == state.layers.keys()
    for name, layer in found.items():
        ours, theirs = state.layers[name], (layer.lora_B["ours"].weight.detach(), layer.lora_A["ours"].weight.detach())
        # scale_1 B_1 A_1 - scale_2 B_2 A_2 as one product
        up = torch.cat([layer.scaling["ours"] * theirs[0].float(), -ours.scale * ours.up], dim=1)
        difference = up @ torch.cat([theirs[1].float(), ours.down])
        assert max(float(difference.max()), -float(difference.min())) <= 1e-6, name


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["", ".*", r"proj_out|norm_out\.linear", "to_q,proj_out"])
def test_diffusers_format_is_loaded_completely(tmp_path, flux, caplog, targets, rslora):
    trained = make_transformer()
    inject_lora(trained, flux, targets, 4, alpha=10, rslora=rslora)
    randomise(trained)
    save_lora(tmp_path / "lora.safetensors", {"dit": lora_state(trained)}, flux, "diffusers")
    pipe = pipeline(make_transformer())
    load(pipe, tmp_path / "lora.safetensors", caplog)
    assert_same_changes(pipe.transformer, lora_state(trained))
    assert_nothing_unmatched(caplog)


def test_different_ranks_and_alphas_are_loaded_completely(tmp_path, flux, caplog):
    shapes = linear_shapes(make_transformer())
    state = random_state(shapes, lambda name: 2 + len(name) % 3, alpha=5.0)
    save_lora(tmp_path / "lora.safetensors", {"dit": state}, flux, "diffusers")
    pipe = pipeline(make_transformer())
    load(pipe, tmp_path / "lora.safetensors", caplog)
    assert_same_changes(pipe.transformer, state)


def test_dora_is_loaded_completely(tmp_path, flux, caplog):
    trained = make_transformer()
    inject_lora(trained, flux, "to_q,ff.net.2", 4, alpha=10, dora=True)
    randomise(trained)
    save_lora(tmp_path / "lora.safetensors", {"dit": lora_state(trained)}, flux, "diffusers")
    pipe = pipeline(make_transformer())
    load(pipe, tmp_path / "lora.safetensors", caplog)
    assert_same_changes(pipe.transformer, lora_state(trained))
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert layer.use_dora["ours"]
    expected = lora_state(trained).layers["transformer_blocks.0.attn.to_q"].dora_scale
    torch.testing.assert_close(layer.lora_magnitude_vector["ours"].weight.detach(), expected)


@pytest.mark.parametrize("fmt", ["diffusers", "kohya", "comfyui"])
def test_text_encoder_is_loaded_completely(tmp_path, flux, clip, caplog, fmt):
    import copy

    fresh = copy.deepcopy(clip)
    inject_lora(clip, flux, "q_proj,k_proj,v_proj,out_proj,fc1,fc2", 4, alpha=10)
    randomise(clip)
    states = {"text_encoder": lora_state(clip)}
    if fmt == "diffusers":
        trained = make_transformer()
        inject_lora(trained, flux, "to_q", 2)
        states["dit"] = lora_state(trained)
    save_lora(tmp_path / "lora.safetensors", states, flux, fmt)
    pipe = pipeline(make_transformer(), fresh)
    load(pipe, tmp_path / "lora.safetensors", caplog)
    assert_same_changes(pipe.text_encoder, states["text_encoder"])
    assert_nothing_unmatched(caplog)
