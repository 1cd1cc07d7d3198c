"""Files in four formats, against the recorded key tables."""

from __future__ import annotations

import functools
import itertools
import json
import random
import re

import pytest
import torch
from lora_networks import assert_same_deltas, linear_shapes, make_transformer, random_state, randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffsynth.adapters.formats import FORMATS, check_format
from diffsynth.adapters.lora import inject_lora, load_lora_file, lora_state, save_lora
from diffsynth.adapters.names import family_names
from diffsynth.core.errors import UserError
from diffsynth.models.keymap import to_ours
from diffsynth.models.registry import get_family

WITHOUT_LAST = r"(single_)?transformer_blocks.*|x_embedder|context_embedder|time_text_embed.*"


@functools.cache
def trained_state(targets: str = WITHOUT_LAST, rslora: bool = False):
    network = make_transformer()
    inject_lora(network, get_family("flux"), targets, rank=4, alpha=10, rslora=rslora)
    randomise(network)
    return lora_state(network)


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_equals_the_recorded_names_and_loads_back(tmp_path, flux, check_lora, fmt):
    state = trained_state()
    path = tmp_path / "lora.safetensors"
    save_lora(path, {"dit": state}, flux, fmt, base="FLUX.1", options={"learning_rate": 1e-4})
    errors, warnings, _ = check_lora.check(path, "flux1-dev", fmt, shapes="ignore", metadata="require")
    assert (errors, warnings) == ([], [])
    loaded = load_lora_file(path, flux)
    assert_same_deltas(state, loaded["dit"])
    assert loaded["dit"].metadata["base"] == "FLUX.1"
    assert json.loads(loaded["dit"].metadata["options"]) == {"learning_rate": 1e-4}
    assert (loaded["dit"].metadata["rank"], loaded["dit"].metadata["alpha"]) == ("4", "10")


def test_all_formats_mean_the_same_change(tmp_path, flux, delta_tool):
    state = trained_state()
    changes = {}
    for fmt in FORMATS:
        path = tmp_path / f"{fmt}.safetensors"
        save_lora(path, {"dit": state}, flux, fmt)
        changes[fmt] = delta_tool.effective(path, "flux1-dev", fmt, FORMATS)
    for first, second in itertools.combinations(FORMATS, 2):
        worst, size, _, where, only_first, only_second = delta_tool.compare(changes[first], changes[second])
        assert worst <= 1e-6, (first, second, where)
        assert size > 0.1
        assert only_first == only_second == []


@pytest.mark.parametrize("fmt", ["comfyui", "diffsynth"])
def test_last_layers_are_written_with_their_halves_in_the_original_order(tmp_path, flux, delta_tool, check_lora, fmt):
    state = trained_state(r"norm_out\.linear|proj_out")
    for name in ("a", "b"):
        save_lora(tmp_path / name, {"dit": state}, flux, {"a": "diffusers", "b": fmt}[name])
    errors, _, _ = check_lora.check(tmp_path / "b", "flux1-dev", fmt, shapes="ignore", metadata="require")
    assert errors == []
    formats = ["diffusers", fmt]
    first = delta_tool.effective(tmp_path / "a", "flux1-dev", "diffusers", formats)
    second = delta_tool.effective(tmp_path / "b", "flux1-dev", fmt, formats)
    assert delta_tool.compare(first, second)[0] <= 1e-6
    ours, theirs = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    up = next(value for key, value in theirs.items() if re.search("(norm_out|adaLN).*(_B|_up)", key))
    assert not torch.allclose(ours["transformer.norm_out.linear.lora_B.weight"], up, atol=1e-3)
    assert_same_deltas(state, load_lora_file(tmp_path / "b", flux)["dit"])


@pytest.mark.parametrize("seed", range(12))
def test_any_subset_of_layers_survives_every_format(tmp_path, flux, check_lora, seed):
    rng = random.Random(seed)
    shapes = {name: shape for name, shape in linear_shapes(make_transformer()).items()
              if name not in ("proj_out", "norm_out.linear")}
    chosen = {name: shapes[name] for name in rng.sample(sorted(shapes), rng.randint(1, len(shapes)))}
    state = random_state(chosen, lambda name: rng.choice([1, 2, 3, 6]), alpha=rng.choice([1.0, 2.5, 4.0]))
    for fmt in FORMATS:
        path = tmp_path / f"{fmt}.safetensors"
        save_lora(path, {"dit": state}, flux, fmt)
        errors, _, _ = check_lora.check(path, "flux1-dev", fmt, shapes="ignore", metadata="require")
        assert errors == []
        assert_same_deltas(state, load_lora_file(path, flux)["dit"])


@pytest.mark.parametrize("fmt", FORMATS)
def test_rslora_keeps_its_scale(tmp_path, flux, delta_tool, check_lora, fmt):
    state = trained_state("to_q,to_k,proj_mlp", rslora=True)
    assert next(iter(state.layers.values())).scale == 5.0
    path = tmp_path / "lora.safetensors"
    save_lora(path, {"dit": state}, flux, fmt)
    assert check_lora.check(path, "flux1-dev", fmt, shapes="ignore", metadata="require")[0] == []
    assert_same_deltas(state, load_lora_file(path, flux)["dit"])
    save_lora(tmp_path / "plain", {"dit": state}, flux, "comfyui")
    changes = [delta_tool.effective(p, "flux1-dev", f, [fmt, "comfyui"])
               for p, f in ((path, fmt), (tmp_path / "plain", "comfyui"))]
    assert delta_tool.compare(*changes)[0] <= 1e-6


@pytest.mark.parametrize("fmt", ["diffusers", "kohya", "comfyui"])
def test_text_encoders_are_named_as_recorded(tmp_path, flux, clip, t5, check_lora, fmt):
    states = {}
    for name, network in (("text_encoder", clip), ("text_encoder_2", t5)):
        targets = "q_proj,k_proj,v_proj,out_proj,fc1,fc2" if network is clip else "q,k,v,o,wi_0,wi_1,wo"
        inject_lora(network, flux, targets, rank=2, alpha=5)
        randomise(network)
        states[name] = lora_state(network)
    path = tmp_path / "lora.safetensors"
    save_lora(path, states, flux, fmt)
    errors, warnings, info = check_lora.check(path, "flux1-dev", fmt, shapes="ignore", metadata="require")
    assert (errors, warnings) == ([], [])
    assert info["components"] == ["text_encoder", "text_encoder_2"]
    loaded = load_lora_file(path, flux)
    for name, state in states.items():
        assert_same_deltas(state, loaded[name])


def test_kohya_file_without_alpha_has_scale_one(tmp_path, flux):
    state = trained_state("attn.to_out.0")
    save_lora(tmp_path / "with", {"dit": state}, flux, "kohya")
    tensors = {key: value for key, value in load_file(tmp_path / "with").items() if not key.endswith(".alpha")}
    save_file(tensors, tmp_path / "without")
    layer = load_lora_file(tmp_path / "without", flux)["dit"].layers["transformer_blocks.0.attn.to_out.0"]
    assert layer.scale == 1.0


@pytest.mark.parametrize("prefix", ["", "pipe.dit.", "dit.", "diffusion_model.", "transformer.", "base_model.model.",
                                    "base_model.model.transformer.", "model.diffusion_model."])
@pytest.mark.parametrize("suffix", ["lora_A.default.weight", "lora_A.weight", "lora_down.weight", "lora.down.weight"])
@pytest.mark.parametrize("fmt", ["diffusers", "comfyui", "diffsynth"])
def test_spellings_in_the_wild_are_read(tmp_path, flux, prefix, suffix, fmt):
    state = trained_state("to_q,to_k,to_v,proj_mlp,ff.net.2")
    save_lora(tmp_path / "known", {"dit": state}, flux, fmt)
    with safe_open(tmp_path / "known", "pt") as file:
        metadata = file.metadata()
    old_prefix, old_suffix = {
        "diffusers": ("transformer.", "lora_A.weight"), "comfyui": ("diffusion_model.", "lora_down.weight"),
        "diffsynth": ("", "lora_A.default.weight"),
    }[fmt]
    old = (old_suffix, old_suffix.replace("_A", "_B").replace("down", "up"))
    new = (suffix, suffix.replace("_A", "_B").replace("down", "up"))
    renamed = {
        prefix + key.removeprefix(old_prefix).replace(old[0], new[0]).replace(old[1], new[1]): value
        for key, value in load_file(tmp_path / "known").items()
    }
    save_file(renamed, tmp_path / "wild", metadata)
    assert_same_deltas(state, load_lora_file(tmp_path / "wild", flux)["dit"])


def test_fused_file_with_one_down_factor_is_split_into_copies(tmp_path, flux):
    down, up = torch.randn(3, 32), torch.randn(96, 3)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(6.0)}
    save_file(tensors, tmp_path / "fused")
    state = load_lora_file(tmp_path / "fused", flux)["dit"]
    parts = [state.layers[f"transformer_blocks.0.attn.to_{name}"].delta() for name in "qkv"]
    torch.testing.assert_close(torch.cat(parts), 2 * up @ down, atol=1e-6, rtol=0)
    save_lora(tmp_path / "diffusers", {"dit": state}, flux, "diffusers")
    save_lora(tmp_path / "again", {"dit": state}, flux, "kohya")
    assert load_file(tmp_path / "again")[f"{name}.lora_down.weight"].shape == (3, 32)


def test_same_state_gives_the_same_bytes(tmp_path, flux):
    for name in ("a", "b"):
        save_lora(tmp_path / name, {"dit": trained_state()}, flux, "diffusers", options={"b": 1, "a": 2})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("fmt", FORMATS)
def test_checkpoint_of_the_older_page_keeps_the_scale(tmp_path, flux, fmt):
    state = trained_state("to_q,to_k")
    path = tmp_path / "version_0" / "epoch=0-step=500.ckpt"
    save_lora(path, {"dit": state}, flux, fmt)
    assert all(isinstance(value, torch.Tensor) for value in torch.load(path, weights_only=True).values())
    assert_same_deltas(state, load_lora_file(path, flux)["dit"])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_alpha_metadata_never_enters_a_kohya_file(tmp_path, flux):
    save_lora(tmp_path / "lora", {"dit": trained_state()}, flux, "kohya")
    with safe_open(tmp_path / "lora", "pt") as file:
        assert "lora_adapter_metadata" not in file.metadata()
        assert all(key.startswith("lora_unet_") for key in file.keys())  # noqa: SIM118


def test_dora_travels_in_diffusers_names_only(tmp_path, flux, transformer):
    inject_lora(transformer, flux, "to_q", rank=2, dora=True)
    randomise(transformer)
    state = lora_state(transformer)
    save_lora(tmp_path / "lora", {"dit": state}, flux, "diffusers")
    loaded = load_lora_file(tmp_path / "lora", flux)["dit"]
    name = "transformer_blocks.0.attn.to_q"
    torch.testing.assert_close(loaded.layers[name].dora_scale, state.layers[name].dora_scale)
    with pytest.raises(UserError, match="use --lora_format diffusers"):
        save_lora(tmp_path / "kohya", {"dit": state}, flux, "kohya")
    assert not (tmp_path / "kohya").exists()


def test_layer_without_a_name_is_refused_with_the_formats_that_have_one(tmp_path, flux):
    state = trained_state(r"norm_out\.linear")
    with pytest.raises(UserError, match=r"'norm_out.linear' of dit has no name in the kohya format; use --lora_format "
                                        "diffusers or comfyui or diffsynth"):
        save_lora(tmp_path / "lora", {"dit": state}, flux, "kohya")
    with pytest.raises(UserError, match="diffsynth format"):
        check_format(flux, "diffsynth", "text_encoder", ["encoder.layers.0.mlp.fc1"])
    with pytest.raises(UserError, match="no LoRA file format"):
        check_format(flux, "auto", "vae", ["encoder.conv_in"])


def test_unknown_format_is_refused_with_a_suggestion(tmp_path, flux):
    with pytest.raises(UserError, match="Did you mean 'kohya'"):
        save_lora(tmp_path / "lora", {"dit": trained_state("to_q")}, flux, "koya")


def lora_of(*modules: str) -> dict[str, torch.Tensor]:
    return {f"{module}.{name}.weight": torch.ones(2, 2) for module in modules for name in ("lora_down", "lora_up")}


@pytest.mark.parametrize(("tensors", "message"), [
    (lora_of("lora_unet_input_blocks_4_1_proj_in", "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
     "not a LoRA of flux: none of its 2 layers"),
    (lora_of("diffusion_model.blocks.0.self_attn.q"), "not a LoRA of flux"),
    (lora_of("lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_distilled_guidance_layer_in_proj"),
     "only 1 of its 2 layers match"),
    ({"img_in.weight": torch.ones(2, 2)}, "not a LoRA file"),
    ({"lora_unet_img_in.hada_w1_a": torch.ones(2, 2)}, "another kind than LoRA"),
    ({**lora_of("lora_unet_img_in"), "lora_unet_img_in.diff_b": torch.ones(2)}, "another kind"),
    ({**lora_of("lora_unet_img_in"), "img_in.weight": torch.ones(2)}, "not part of a LoRA"),
    ({"lora_unet_img_in.lora_down.weight": torch.ones(2, 2)}, "not the up factor"),
    ({**lora_of("lora_unet_img_in"), "lora_unet_img_in.lora_up.weight": torch.ones(2, 3)}, "do not multiply"),
    ({**lora_of("lora_unet_img_in"), "lora_unet_img_in.alpha": torch.tensor(float("nan"))}, "not one positive number"),
    (lora_of("lora_unet_img_in", "x_embedder"), "twice"),
    ({**lora_of("lora_unet_img_in"), "lora_unet_img_in.lora_A.weight": torch.ones(2, 2)}, "stands twice"),
])
def test_wrong_file_is_named(tmp_path, flux, tensors, message):
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        load_lora_file(tmp_path / "wrong.safetensors", flux)
    assert "wrong.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def rows_of(source: list) -> torch.Tensor:
    """A number for every row of the original weights that a recorded module stands for."""
    return torch.cat([
        torch.arange(first, first + count) + (hash(weight) % 2**40) * 2**20 for weight, first, count in source
    ])


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_recorded_name_stands_for_the_recorded_rows(flux, check_lora, fmt):
    lookup = family_names(flux)
    ours = check_lora.modules_of(check_lora.table("flux1-dev", "diffusers"))
    # ComfyUI also accepts FLUX.2's spelling of these layers and a half of linear1, which no FLUX.1 trainer writes
    unusual = re.compile("linear_in|linear_out|to_qkv_mlp_proj|single.*to_out|linear1_qkv|text_encoders.transformer")
    recorded = {name: entry for name, entry in check_lora.modules_of(check_lora.table("flux1-dev", fmt)).items()
                if not unusual.search(name)}
    for name, entry in recorded.items():
        found = lookup.match(name)
        assert found, name
        names, match = found
        parts = to_ours(match.rule, rows_of(entry["src"]))
        for module, rows in zip(match.ours, parts, strict=True):
            level = "text_model." if names.component == "text_encoder" else ""
            assert torch.equal(rows, rows_of(ours[f"{names.diffusers}{level}{module}"]["src"])), (name, module)
