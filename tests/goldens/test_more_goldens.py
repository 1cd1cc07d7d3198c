"""Networks of further families: the original implementation's numbers from its own files, and the published lists.

Their families are not registered yet; what is proved here is recognition, configuration, table and class.
Source of the fixtures: see each config.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffsynth.core.loader.reader import WeightReader
from diffsynth.models.autoencoder_kl import FLUX_VAE, SD_VAE
from diffsynth.models.building import build_empty, stream_weights
from diffsynth.models.clip import CLIP_L
from diffsynth.models.clip_projected import CLIP_G, CLIP_L_PROJECTED
from diffsynth.models.hunyuan_dit import BERT, HUNYUAN_DIT
from diffsynth.models.keymap import shapes_to_ours
from diffsynth.models.recognition import assign_weights, find_components
from diffsynth.models.sd3_transformer import SD3_DIT, SD35_DIT
from diffsynth.models.spec import ComponentSpec
from diffsynth.models.t5 import MT5_XL
from diffsynth.models.unet import KOLORS_UNET, SD_UNET, SDXL_UNET

DATA = Path(__file__).parents[1] / "data"
TOLERANCE = 1e-4
Tensors = dict[str, torch.Tensor]


def load(path: Path, spec: ComponentSpec) -> Any:
    """The network of a file, as the loader of a registered family builds it."""
    with WeightReader(path) as reader:
        (found,) = find_components(reader, [spec])
        module = build_empty(spec, found.config)
        stray = assign_weights(reader.tensors, [found], [module.state_dict().keys()])
        assert (found.missing, found.unexpected, stray) == ([], [], [])
        assert set(found.expected_names()) == set(module.state_dict())
        stream_weights(module, found, reader, torch.float32, "cpu")
    return module


def run_unet(unet: Any, io: Tensors) -> dict[str, torch.Tensor]:
    sizes = {"text_embeds": io["in.pooled"], "time_ids": io["in.time_ids"]} if "in.pooled" in io else None
    return {"eps": unet(io["in.x"], io["in.t"], encoder_hidden_states=io["in.context"],
                        added_cond_kwargs=sizes, return_dict=False)[0]}


def run_sd3(dit: Any, io: Tensors) -> dict[str, torch.Tensor]:
    return {"x": dit(hidden_states=io["in.x"], encoder_hidden_states=io["in.context"],
                     pooled_projections=io["in.y"], timestep=io["in.t"], return_dict=False)[0]}


def run_hunyuan(dit: Any, io: Tensors) -> dict[str, torch.Tensor]:
    return {"x": dit(
        io["in.x"], io["in.t"], encoder_hidden_states=io["in.text"], text_embedding_mask=io["in.text_mask"],
        encoder_hidden_states_t5=io["in.t5"], text_embedding_mask_t5=io["in.t5_mask"],
        image_rotary_emb=(io["in.cos"], io["in.sin"]), return_dict=False)[0]}


def run_clip(clip: Any, io: Tensors) -> dict[str, torch.Tensor]:
    output = clip(io["in.input_ids"], output_hidden_states=True)
    return {"text_embeds": output.text_embeds, "hidden_minus2": output.hidden_states[-2],
            "last_hidden_state": output.last_hidden_state}


def run_clip_l(clip: Any, io: Tensors) -> dict[str, torch.Tensor]:
    # the projection that the file leaves out is the identity
    return {"pooled": clip(io["in.input_ids"]).text_embeds}


GOLDENS: dict[str, tuple[str, ComponentSpec, Callable[[Any, Tensors], dict[str, torch.Tensor]]]] = {
    "sd15_unet": ("unet-in-ckpt.safetensors", SD_UNET, run_unet),
    "sdxl_unet": ("unet-in-ckpt.safetensors", SDXL_UNET, run_unet),
    "sd3_medium": ("sd3-tiny.safetensors", SD3_DIT, run_sd3),
    "sd35_large": ("sd3-tiny.safetensors", SD35_DIT, run_sd3),
    "hunyuandit_v12": ("pytorch_model_ema.pt", HUNYUAN_DIT, run_hunyuan),
    "clip_g": ("clip_g.safetensors", CLIP_G, run_clip),
    "clip_l": ("clip_l.safetensors", CLIP_L_PROJECTED, run_clip_l),
}


@torch.no_grad()
@pytest.mark.parametrize("name", GOLDENS)
def test_numbers_of_the_original_implementation(name: str):
    file, spec, run = GOLDENS[name]
    io = load_file(DATA / "golden" / name / "io.safetensors")
    for output, found in run(load(DATA / "golden" / name / file, spec), io).items():
        assert (found - io[f"out.{output}"]).abs().max() <= TOLERANCE, output


@pytest.mark.parametrize("name", ["sd15_unet", "sdxl_unet", "sd3_medium", "sd35_large"])
def test_the_table_leads_back(name: str):
    file, spec, _ = GOLDENS[name]
    original = load_file(DATA / "golden" / name / file)
    layout = spec.layouts[0]
    prefix = next(prefix for prefix in reversed(layout.prefixes) if all(key.startswith(prefix) for key in original))
    original = {key.removeprefix(prefix): tensor for key, tensor in original.items()}
    table = layout.key_map(layout.config({key: tuple(tensor.shape) for key, tensor in original.items()}))
    again = table.to_original(table.to_ours(original))
    assert set(again) == set(original)
    assert all(torch.equal(again[key], tensor) for key, tensor in original.items())


def test_openclip_names_lead_to_the_same_network(tmp_path: Path):
    """SDXL's single file has OpenCLIP's names and a projection that is transposed; it is square, so that it shows."""
    from safetensors.torch import save_file

    clip = load(DATA / "golden" / "clip_g" / "clip_g.safetensors", CLIP_G)
    table = CLIP_G.layouts[0].key_map({"num_hidden_layers": clip.config.num_hidden_layers})
    bundled = {f"conditioner.embedders.1.model.{key}": tensor.contiguous()
               for key, tensor in table.to_original(clip.state_dict()).items()}
    save_file(bundled, tmp_path / "bundle.safetensors")
    again = load(tmp_path / "bundle.safetensors", CLIP_G).state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in clip.state_dict().items())


PUBLISHED = [
    ("sd15", SD_UNET, 0, "model.diffusion_model."), ("sd15", SD_VAE, 0, "first_stage_model."),
    ("sd15", CLIP_L, 0, "cond_stage_model.transformer."),
    ("sdxl", SDXL_UNET, 0, "model.diffusion_model."), ("sdxl", SD_VAE, 0, "first_stage_model."),
    ("sdxl", CLIP_L, 0, "conditioner.embedders.0.transformer."),
    ("sdxl", CLIP_G, 0, "conditioner.embedders.1.model."),
    ("kolors-unet", KOLORS_UNET, 0, ""), ("sdxl-vae-fp16-fix", SD_VAE, 1, ""),
    ("sd3_medium", SD3_DIT, 0, "model.diffusion_model."), ("sd3_medium", FLUX_VAE, 0, "first_stage_model."),
    ("sd3_medium_incl_clips", CLIP_L_PROJECTED, 0, "text_encoders.clip_l.transformer."),
    ("sd3_medium_incl_clips", CLIP_G, 1, "text_encoders.clip_g.transformer."),
    ("sd3.5_large", SD35_DIT, 0, "model.diffusion_model."), ("sd35-clip_g", CLIP_G, 1, ""),
    ("hunyuandit_v12", HUNYUAN_DIT, 0, ""), ("hunyuan-bert", BERT, 0, "bert."), ("hunyuan-mt5", MT5_XL, 0, ""),
]
"""List of a published file, network in it, layout, prefix."""


@pytest.mark.parametrize(("name", "spec", "index", "prefix"), PUBLISHED, ids=lambda value: getattr(value, "kind", None))
def test_published_lists_match_the_class_with_nothing_over(
    name: str, spec: ComponentSpec, index: int, prefix: str
):
    listed = json.loads((DATA / "real_keys" / f"{name}.json").read_text(encoding="utf-8"))["keys"]
    layout = spec.layouts[index]
    assert prefix in layout.prefixes
    shapes = {key.removeprefix(prefix): tuple(shape) for key, shape in listed.items() if key.startswith(prefix)}
    assert layout.signature.keys() <= shapes.keys()
    config = layout.config(shapes)
    table = layout.key_map(config) if layout.key_map else None
    found: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        if any(re.fullmatch(pattern, key) for pattern in layout.ignored):
            continue
        match = table.match_original(key) if table else None
        found.update(zip(match.ours, shapes_to_ours(match.rule, shape), strict=True) if match else [(key, shape)])
    module = build_empty(spec, config)
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items() if key not in spec.identity}
    assert {key: shape for key, shape in found.items() if key not in spec.identity} == expected
