"""The original implementation's numbers, reproduced from its own files with no configuration given.

Source of the fixtures: black-forest-labs/flux@802fb471 and Stability-AI/sd3.5@fbf8f483, see each config.json.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffsynth.models.inspection import inspect_files
from diffsynth.models.loading import load_component, module_config, save_component

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TOLERANCE = 1e-4
FILES = {
    "flux_dit": "flux1-tiny.safetensors",
    "flux_ae": "ae.safetensors",
    "clip_l": "clip_l.safetensors",
    "t5xxl": "t5xxl_fp16.safetensors",
}


def golden(name: str) -> tuple[Path, dict[str, torch.Tensor]]:
    return GOLDEN / name / FILES[name], load_file(GOLDEN / name / "io.safetensors")


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    assert (output - expected).abs().max().item() <= TOLERANCE


def run_dit(dit: torch.nn.Module, io: dict[str, torch.Tensor]) -> torch.Tensor:
    return dit(
        hidden_states=io["in.img"], encoder_hidden_states=io["in.txt"], pooled_projections=io["in.y"],
        timestep=io["in.timesteps"], guidance=io["in.guidance"], img_ids=io["in.img_ids"][0],
        txt_ids=io["in.txt_ids"][0], return_dict=False,
    )[0]  # fmt: skip


@torch.no_grad()
def test_flux_dit():
    path, io = golden("flux_dit")
    dit = load_component(path, torch_dtype=torch.float32)
    assert type(dit).__name__ == "FluxTransformer2DModel"
    assert not dit.training
    assert_close(run_dit(dit, io), io["out.img"])


@torch.no_grad()
def test_flux_ae():
    path, io = golden("flux_ae")
    vae = load_component(path, torch_dtype=torch.float32)
    distribution = vae.encode(io["in.image"]).latent_dist
    assert_close(distribution.parameters, io["out.moments"])
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    assert_close((distribution.mean - shift) * scale, io["out.latent_scaled"])
    assert_close(vae.decode(io["out.latent_scaled"] / scale + shift).sample, io["out.image"])


@torch.no_grad()
def test_clip_l():
    path, io = golden("clip_l")
    output = load_component(path)(io["in.input_ids"], output_hidden_states=True)
    assert_close(output.last_hidden_state, io["out.last_hidden_state"])
    assert_close(output.hidden_states[-2], io["out.hidden_minus2"])
    assert_close(output.pooler_output, io["out.pooled"])


@torch.no_grad()
def test_t5xxl():
    path, io = golden("t5xxl")
    assert_close(load_component(path)(io["in.input_ids"]).last_hidden_state, io["out.last_hidden_state"])


@pytest.mark.parametrize(
    ("name", "component", "class_name"),
    [
        ("flux_dit", "dit", "FluxTransformer2DModel"),
        ("flux_ae", "vae", "AutoencoderKL"),
        ("clip_l", "text_encoder", "CLIPTextModel"),
        ("t5xxl", "text_encoder_2", "T5EncoderModel"),
    ],
)
def test_inspect_says_what_it_is(name: str, component: str, class_name: str):
    path, _ = golden(name)
    (described,) = inspect_files(path)["components"]
    assert (described["name"], described["class"], described["family"]) == (component, class_name, "flux")
    assert described["missing"] == described["unexpected"] == []
    module = load_component(path)
    assert described["num_parameters"] == sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("name", list(FILES))
def test_saved_and_loaded_again_is_the_same(name: str, layout: str, tmp_path: Path):
    path, _ = golden(name)
    module = load_component(path)
    saved = save_component(module, tmp_path / "x.safetensors", module._diffsynth_source.spec, layout)
    again = load_component(saved)
    assert module_config(again) == module_config(module)
    for key, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["flux_dit", "flux_ae"])
def test_original_names_are_written_back(name: str, tmp_path: Path):
    path, _ = golden(name)
    module = load_component(path)
    spec = module._diffsynth_source.spec
    original, saved = load_file(path), load_file(save_component(module, tmp_path / "x.safetensors", spec))
    assert set(saved) == set(original)
    for key, value in original.items():
        assert torch.equal(saved[key], value.float()), key


@torch.no_grad()
def test_the_golden_sees_a_modulation_that_is_not_swapped():
    path, io = golden("flux_dit")
    dit = load_component(path)
    shift, scale = dit.norm_out.linear.weight.chunk(2)
    dit.norm_out.linear.weight.copy_(torch.cat([scale, shift]))
    assert (run_dit(dit, io) - io["out.img"]).abs().max() > 0.1
