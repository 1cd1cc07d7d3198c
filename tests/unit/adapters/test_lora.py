"""LoRA on a network: targets, initial values, loading, fusing, removing."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from lora_networks import TABLES, make_transformer, randomise

from diffsynth.adapters.lora import (
    add_lora_file,
    apply_lora,
    clear_lora,
    inject_lora,
    load_lora_file,
    load_lora_weights,
    lora_state,
    save_lora,
)
from diffsynth.adapters.targets import resolve_targets
from diffsynth.core.errors import UserError

QKV = "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj"


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    sizes = {"hidden_states": (1, 4, 16), "encoder_hidden_states": (1, 3, 24), "pooled_projections": (1, 20)}
    values = {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}
    return {**values, "timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.5]),
            "img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}


@torch.no_grad()
def output(network: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return network(**inputs(dtype), return_dict=False)[0].float()


def trained(flux, targets: str = "", alpha: float = 10, seed: int = 1, **options):
    network = make_transformer()
    inject_lora(network, flux, targets, 4, alpha, **options)
    randomise(network, seed)
    return network, lora_state(network)


def test_only_lora_factors_are_trainable_and_start_without_effect(flux, transformer):
    before = output(transformer)
    names = inject_lora(transformer, flux, QKV, 4)
    assert torch.equal(output(transformer), before)
    trainable = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.{factor}.default.weight" for name in names for factor in ("lora_A", "lora_B")}
    assert all(transformer.get_parameter(name).dtype == torch.float32 for name in trainable)


def test_initial_values_depend_on_seed_and_name_only(flux):
    first, second, other = make_transformer(), make_transformer(), make_transformer()
    inject_lora(first, flux, "to_q,ff.net.2", 4, seed=3)
    torch.randn(5)
    inject_lora(second, flux, "ff.net.2,proj_mlp,to_q", 4, seed=3)
    inject_lora(other, flux, "to_q", 4, seed=4)
    a, b, c = (lora_state(network).layers["transformer_blocks.1.attn.to_q"].down for network in (first, second, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert float(a.abs().max()) <= 1 / 32**0.5
    assert float(a.std()) == pytest.approx(1 / 96**0.5, rel=0.15)


def test_global_generator_is_not_touched(flux, transformer):
    state = torch.random.get_rng_state()
    inject_lora(transformer, flux, QKV, 4)
    assert torch.equal(state, torch.random.get_rng_state())


def test_default_targets_are_the_layers_the_older_page_trains(flux, transformer):
    older = json.loads((TABLES / "flux1-dev.diffsynth.json").read_text(encoding="utf-8"))["default_targets"]
    assert resolve_targets(transformer, flux, ",".join(older)) == resolve_targets(transformer, flux, "")
    assert len(resolve_targets(transformer, flux, "")) == 2 * 14 + 3 * 6


@pytest.mark.parametrize(("targets", "expected"), [
    ("attn.to_out.0", ["transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.attn.to_out.0"]),
    (r"transformer_blocks\.0\.attn\.(to_q|to_k)", ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"]),
    ("a_to_qkv", [f"transformer_blocks.{i}.attn.to_{n}" for i in range(2) for n in "qkv"]),
    ("img_attn.proj", [f"transformer_blocks.{i}.attn.to_out.0" for i in range(2)]),
    ("blocks.1.ff_b.2", ["transformer_blocks.1.ff_context.net.2"]),
    ("a_to_out,proj_out", [*(f"transformer_blocks.{i}.attn.to_out.0" for i in range(2)),
                           *(f"single_transformer_blocks.{i}.proj_out" for i in range(3))]),
    ("proj_out", [*(f"single_transformer_blocks.{i}.proj_out" for i in range(3)), "proj_out"]),
    (" x_embedder , context_embedder ", ["context_embedder", "x_embedder"]),
])
def test_targets_are_names_or_one_expression_or_older_names(flux, transformer, targets, expected):
    assert resolve_targets(transformer, flux, targets) == expected


@pytest.mark.parametrize(("targets", "message"), [
    ("to_q,to_w", "'to_w' matches no linear layer of FluxTransformer2DModel; it has for example .*Did you mean 'to_"),
    ("attn", "'attn' matches no linear layer"),
    (r"blocks\.99\..*", "matches no linear layer"),
    ("to_q(", "not a valid regular expression"),
])
def test_target_that_matches_nothing_is_named(flux, transformer, targets, message):
    with pytest.raises(UserError, match=message):
        inject_lora(transformer, flux, targets, 4)
    assert not any("lora" in name for name, _ in transformer.named_parameters())


@pytest.mark.parametrize(("rank", "alpha"), [(0, None), (4, 0.0), (4, -1.0), (4, float("inf"))])
def test_rank_and_alpha_out_of_range_are_refused(flux, transformer, rank, alpha):
    with pytest.raises(UserError, match="must be"):
        inject_lora(transformer, flux, "to_q", rank, alpha)


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}])
@pytest.mark.parametrize("mode", ["fused", "hot"])
def test_applied_lora_acts_as_the_trained_network(flux, options, mode):
    network, state = trained(flux, **options)
    plain = make_transformer()
    base = output(plain)
    apply_lora(plain, state, mode=mode)
    torch.testing.assert_close(output(plain), output(network), atol=2e-5, rtol=1e-5)
    assert float((output(plain) - base).abs().max()) > 1e-2
    clear_lora(plain)
    assert torch.equal(output(plain), base)
    assert plain.state_dict().keys() == make_transformer().state_dict().keys()


@pytest.mark.parametrize("modes", [("fused", "fused"), ("hot", "hot"), ("fused", "hot"), ("hot", "fused")])
def test_several_loras_add_up_each_with_its_strength(flux, modes):
    states = [trained(flux, "to_q,to_k")[1], trained(flux, "to_k,ff.net.2", alpha=3, seed=2)[1]]
    expected = make_transformer()
    with torch.no_grad():
        for state, strength in zip(states, (0.5, -1.5), strict=True):
            for name, layer in state.layers.items():
                expected.get_submodule(name).weight += strength * layer.delta()
    network = make_transformer()
    weights = copy.deepcopy(network.state_dict())
    for state, strength, mode in zip(states, (0.5, -1.5), modes, strict=True):
        apply_lora(network, state, strength, mode)
    torch.testing.assert_close(output(network), output(expected), atol=2e-5, rtol=1e-5)
    clear_lora(network)
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("mode", ["fused", "hot"])
def test_bf16_weights_are_changed_in_float32_and_restored(flux, mode):
    state = trained(flux)[1]
    network = make_transformer().to(torch.bfloat16)
    weights = copy.deepcopy(network.state_dict())
    apply_lora(network, state, 0.7, mode)
    if mode == "fused":
        name = "transformer_blocks.0.attn.to_q"
        expected = (weights[f"{name}.weight"].float() + 0.7 * state.layers[name].delta()).bfloat16()
        assert torch.equal(network.get_submodule(name).weight, expected)
    assert output(network, torch.bfloat16).isfinite().all()
    clear_lora(network)
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def test_float8_weights_take_fused_and_hot_loras(flux, caplog):
    from diffsynth.core.memory import store_in_fp8

    state = trained(flux, "to_q,proj_mlp")[1]
    network = make_transformer().requires_grad_(False)
    store_in_fp8(network)
    base = output(network)
    apply_lora(network, state, 1.0, "hot")
    hot = output(network)
    clear_lora(network)
    assert torch.equal(output(network), base)
    with caplog.at_level(logging.WARNING):
        apply_lora(network, state, 1.0, "fused")
    assert "float8" in caplog.text
    assert network.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    difference = float((output(network) - hot).norm() / (hot - base).norm())
    assert difference < 0.5
    clear_lora(network)
    assert torch.equal(output(network), base)


def test_lora_is_trained_on_float8_weights(flux, transformer):
    from diffsynth.core.memory import store_in_fp8

    transformer.requires_grad_(False)
    store_in_fp8(transformer)
    inject_lora(transformer, flux, "to_q", 4)
    transformer(**inputs(), return_dict=False)[0].square().mean().backward()
    factors = {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert all(parameter.dtype == torch.float32 for parameter in factors.values())
    assert all(parameter.grad.isfinite().all() for name, parameter in factors.items() if "lora_B" in name)


def test_hot_lora_leaves_training_as_it_is(flux):
    network, state = trained(flux, "to_q")
    trainable = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    apply_lora(network, trained(flux, "to_q,to_k", seed=4)[1], mode="hot")
    assert {name for name, parameter in network.named_parameters() if parameter.requires_grad} == trainable
    full = make_transformer()
    apply_lora(full, state, mode="hot")
    frozen = {name for name, parameter in full.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert all("lora_" in name for name in frozen)
    clear_lora(network)
    again = lora_state(network)
    assert all(torch.equal(layer.up, again.layers[name].up) for name, layer in state.layers.items())


def test_training_continues_from_a_file(tmp_path, flux):
    network, state = trained(flux, QKV, alpha=12)
    save_lora(tmp_path / "lora.safetensors", {"dit": state}, flux, "kohya")
    other = make_transformer()
    inject_lora(other, flux, QKV, 4, alpha=4)
    load_lora_weights(other, load_lora_file(tmp_path / "lora.safetensors", flux), "dit")
    torch.testing.assert_close(output(other), output(network), atol=2e-5, rtol=1e-5)


def test_training_from_a_file_with_other_layers_or_rank_is_refused(flux, transformer):
    inject_lora(transformer, flux, "to_q", 4)
    with pytest.raises(UserError, match="only in the file"):
        load_lora_weights(transformer, {"dit": trained(flux, "to_q,to_k")[1]})
    other = make_transformer()
    inject_lora(other, flux, "to_q", 8)
    with pytest.raises(UserError, match="has rank 4"):
        load_lora_weights(other, {"dit": trained(flux, "to_q")[1]})


def test_lora_of_a_larger_or_wider_model_is_refused_by_name(tmp_path, flux):
    state = trained(flux, "to_q")[1]
    save_lora(tmp_path / "lora.safetensors", {"dit": state}, flux)
    with pytest.raises(UserError, match=r"lora.safetensors: layer 'transformer_blocks.1.attn.to_q' does not exist"):
        add_lora_file(make_transformer(num_layers=1), "dit", tmp_path / "lora.safetensors", flux)
    network = make_transformer(attention_head_dim=32, axes_dims_rope=(8, 12, 12))
    weights = copy.deepcopy(network.state_dict())
    with pytest.raises(UserError, match=r"shape \(32, 32\), and here it has \(64, 64\)"):
        add_lora_file(network, "dit", tmp_path / "lora.safetensors", flux)
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    with pytest.raises(UserError, match="holds no layers of text_encoder"):
        add_lora_file(network, "text_encoder", tmp_path / "lora.safetensors", flux)
