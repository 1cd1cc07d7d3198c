"""Our FLUX draws what ``diffusers.FluxPipeline`` draws on the same weights, prompt and seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffsynth import FluxImagePipeline
from diffsynth.pipelines.flux import image_token_ids, pack_latents, unpack_latents
from tests.tiny_flux import model_files

PROMPTS = ["a dog", "a photo of a red circle on a blue background", "two green squares and a yellow star"]


@pytest.fixture(scope="module")
def pipe(flux_folder):
    return FluxImagePipeline.from_pretrained(torch.float32, "cpu", model_files(flux_folder))


def compare(pipe, tiny_flux, **arguments):
    """Largest difference of latents, and of pictures in 0..255."""
    ours_alone = ("cfg_scale", "embedded_guidance", "num_images", "seed")
    theirs = {name: value for name, value in arguments.items() if name not in ours_alone}
    theirs.update(
        generator=torch.Generator().manual_seed(arguments["seed"]),
        guidance_scale=arguments.get("embedded_guidance", 3.5),
        true_cfg_scale=arguments.get("cfg_scale", 1.0), num_images_per_prompt=arguments.get("num_images", 1),
    )
    tiny_flux.set_progress_bar_config(disable=True)
    latents = pipe(**arguments, output_type="latent", progress_bar_cmd=iter)
    expected = tiny_flux(**theirs, output_type="latent").images
    pictures = pipe(**arguments, progress_bar_cmd=iter)
    pictures = pictures if isinstance(pictures, list) else [pictures]
    theirs["generator"].manual_seed(arguments["seed"])
    expected_pictures = tiny_flux(**theirs, output_type="pil").images
    levels = max(
        np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()
        for a, b in zip(pictures, expected_pictures, strict=True)
    )
    return (pack_latents(latents) - expected).abs().max().item(), levels


@pytest.mark.parametrize("arguments", [
    pytest.param(dict(prompt="a dog", height=64, width=64), id="one image"),
    pytest.param(dict(prompt=PROMPTS, height=64, width=64), id="three prompts of different lengths"),
    pytest.param(dict(prompt="a cat", height=64, width=96), id="landscape"),
    pytest.param(dict(prompt="a cat", height=112, width=48), id="portrait"),
    pytest.param(
        dict(prompt="a dog", negative_prompt="bad quality", cfg_scale=3.0, height=64, width=64), id="true CFG"),
    pytest.param(
        dict(prompt=PROMPTS[:2], negative_prompt=["toy", "doll"], cfg_scale=2.0, height=48, width=64),
        id="true CFG, batch"),
    pytest.param(dict(prompt=PROMPTS[:2], num_images=2, height=48, width=48), id="two pictures for each prompt"),
    pytest.param(dict(prompt="a dog", embedded_guidance=1.5, height=64, width=64), id="other guidance"),
])
def test_picture_equals_that_of_diffusers(pipe, tiny_flux, arguments):
    latent_difference, levels = compare(pipe, tiny_flux, **arguments, num_inference_steps=3, seed=11)
    assert latent_difference <= 1e-4
    assert levels <= 1


def test_schedule_equals_that_of_diffusers(pipe, tiny_flux):
    arguments = dict(prompt="a dog", height=96, width=64, num_inference_steps=5, output_type="latent")
    pipe(**arguments, seed=0, progress_bar_cmd=iter)
    tiny_flux(**arguments)
    assert torch.equal(pipe.scheduler.timesteps, tiny_flux.scheduler.timesteps)
    assert torch.equal(pipe.scheduler.sigmas, tiny_flux.scheduler.sigmas)


def test_without_a_seed_the_noise_is_that_of_the_global_generator(pipe):
    arguments = dict(
        prompt="a dog", height=48, width=48, num_inference_steps=1, output_type="latent", progress_bar_cmd=iter)
    torch.manual_seed(5)
    first = pipe(**arguments)
    torch.manual_seed(5)
    assert torch.equal(first, pipe(**arguments))
    assert not torch.equal(first, pipe(**arguments))


def test_input_image_with_full_strength_is_ignored_and_with_little_is_kept(pipe):
    from tests.pictures import draw_picture

    arguments = dict(
        prompt="a dog", height=64, width=64, num_inference_steps=4, seed=1, output_type="latent", progress_bar_cmd=iter)
    picture = draw_picture(1)
    from_noise = pipe(**arguments)
    assert torch.equal(pipe(**arguments, input_image=picture, denoising_strength=1.0), from_noise)
    inputs = dict(input_image=[picture], height=64, width=64, batch_size=1)
    shared, _, _ = pipe.run_units(inputs, {"prompt": "a dog"}, {})
    little = pipe(**arguments, input_image=picture, denoising_strength=0.25)
    half = pipe(**arguments, input_image=picture, denoising_strength=0.75)
    distance = [(latents - shared["input_latents"]).abs().mean() for latents in (little, half, from_noise)]
    assert distance[0] < distance[1] < distance[2]


def test_schnell_is_recognised_by_its_weights(tmp_path):
    from tests.tiny_flux import build_pipeline, save_original_layout

    theirs = build_pipeline(tmp_path / "tokenizers", guidance_embeds=False)
    ours = FluxImagePipeline.from_pretrained(
        torch.float32, "cpu", model_files(save_original_layout(theirs, tmp_path / "schnell")))
    difference, levels = compare(ours, theirs, prompt="a dog", height=64, width=64, num_inference_steps=4, seed=2,
                                 max_sequence_length=256)
    assert difference <= 1e-4
    assert levels <= 1
    assert ours.default_sequence_length() == 256


def test_packing_is_undone_by_unpacking():
    latents = torch.randn(2, 16, 6, 10)
    assert torch.equal(unpack_latents(pack_latents(latents), 6, 10), latents)
    assert image_token_ids(6, 10)[-1].tolist() == [0, 2, 4]
