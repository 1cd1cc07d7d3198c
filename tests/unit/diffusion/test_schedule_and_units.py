"""The mathematics of training, and what the engine derives from the units' declarations."""

from __future__ import annotations

import math

import pytest
import torch

from diffsynth.core import random
from diffsynth.core.errors import UserError
from diffsynth.diffusion.base_pipeline import images_from_pixels, pixels_from_images
from diffsynth.diffusion.schedule import TimestepSampling, add_noise, shift_sigmas, velocity
from diffsynth.diffusion.unit import PipelineUnit, frozen_prefix
from diffsynth.pipelines.flux import FluxImagePipeline, linear_mu
from tests.pictures import draw_picture


def test_one_euler_step_with_the_true_velocity_returns_the_data():
    latents, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    sigmas = torch.tensor([0.1, 0.5, 1.0])
    noisy = add_noise(latents, noise, sigmas)
    assert torch.allclose(noisy - sigmas.view(-1, 1, 1, 1) * velocity(latents, noise), latents, atol=1e-6)


def test_noise_needs_one_sigma_per_sample():
    with pytest.raises(ValueError, match="2 samples"):
        add_noise(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), torch.zeros(3))


def test_shift_of_the_training_is_that_of_the_sampler():
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    for tokens in (64, 256, 1024, 4096, 9216):
        assert math.isclose(linear_mu(tokens), calculate_shift(tokens), rel_tol=1e-9)
    assert torch.allclose(shift_sigmas(torch.tensor([0.0, 0.5, 1.0]), 3.0), torch.tensor([0.0, 0.75, 1.0]))


@pytest.mark.parametrize(("kind", "shift", "mean"), [
    ("uniform", None, 0.5), ("logit_normal", None, 0.5), ("shifted", None, 0.6479), ("uniform", 3.0, 0.6479)])
def test_sampled_noise_levels_have_the_mean_of_their_distribution(kind, shift, mean):
    torch.manual_seed(0)
    sigmas = TimestepSampling(kind=kind, shift=shift).sample_sigmas(20_000, family_shift=3.0)
    # E[3u / (1 + 2u)] = 3/2 - 3/4 ln 3 for uniform u
    assert abs(sigmas.mean().item() - (1.5 - 0.75 * math.log(3) if mean != 0.5 else 0.5)) < 0.01
    assert sigmas.min() > 0
    assert sigmas.max() <= 1


def test_bell_weights_have_mean_one():
    weights = TimestepSampling(weighting="bell").weights(torch.linspace(0, 1, 10_001))
    assert abs(weights.mean().item() - 1) < 1e-3
    assert weights.argmax() == 5_000


def test_numbers_belong_to_the_item_and_not_to_the_batch():
    with random.keyed_items(7, 2, [5, 9, 1]):
        together = random.normal((3, 4), "noise")
    for row, item in enumerate([5, 9, 1]):
        with random.keyed_items(7, 2, [item]):
            assert torch.equal(random.normal((1, 4), "noise")[0], together[row])
    with random.keyed_items(7, 3, [5]):
        assert not torch.equal(random.normal((1, 4), "noise")[0], together[0])
    with random.keyed_items(7, 2, [5]):
        assert not torch.equal(random.normal((1, 4), "timestep")[0], together[0])


def test_keyed_numbers_never_change_between_versions():
    with random.keyed_items(0, 0, [0]):
        assert random.uniform((1, 3), "timestep")[0].tolist() == pytest.approx(EXPECTED_UNIFORM, abs=1e-7)


EXPECTED_UNIFORM = [0.965173602104187, 0.49846595525741577, 0.7337310910224915]


class Encode(PipelineUnit):
    prompt_inputs = ("prompt",)
    outputs = ("embeds",)
    models = ("text_encoder",)


class Picture(PipelineUnit):
    inputs = ("image",)
    outputs = ("latents",)
    models = ("vae",)


class Noise(PipelineUnit):
    outputs = ("noise",)
    draws_noise = True


class Mix(PipelineUnit):
    inputs = ("latents", "noise")
    outputs = ("mixed",)
    models = ("vae",)


class After(PipelineUnit):
    inputs = ("embeds",)
    outputs = ("adapted",)
    models = ("adapter",)


UNITS = [Encode(), Picture(), Noise(), After()]


@pytest.mark.parametrize(("units", "trainable", "frozen", "released"), [
    (UNITS, ["dit"], [Encode, Picture, After], ["text_encoder", "vae", "adapter"]),
    (UNITS, ["text_encoder"], [Picture], ["vae"]),
    (UNITS, ["adapter"], [Encode, Picture], ["text_encoder", "vae"]),
    ([*UNITS, Mix()], ["dit"], [Encode, Picture, After], ["text_encoder", "adapter"]),
])
def test_frozen_prefix_follows_from_the_declarations(units, trainable, frozen, released):
    prefix = frozen_prefix(units, trainable, ["dit"])
    assert [type(unit) for unit in prefix.units] == frozen
    assert list(prefix.released_models) == released
    assert not {type(unit) for unit in prefix.remaining} & set(frozen)


def test_pixels_and_pictures_convert_without_loss():
    pictures = [draw_picture(index) for index in range(2)]
    pixels = pixels_from_images(pictures)
    assert pixels.shape == (2, 3, 64, 64)
    assert pixels.min() >= -1
    assert [a.tobytes() for a in images_from_pixels(pixels)] == [b.tobytes() for b in pictures]


def test_pictures_of_different_sizes_cannot_share_a_batch():
    with pytest.raises(UserError, match="different sizes"):
        pixels_from_images([draw_picture(0), draw_picture(0, (32, 64))])


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(height=40), "height 40 is not a multiple of 16; the nearest that is: 32"),
    (dict(width=41), "width 41 is not a multiple of 16; the nearest that is: 48"),
    (dict(height=0), "height 0"),
    (dict(num_inference_steps=0), "at least 1"),
    (dict(denoising_strength=1.5), "at most 1, got 1.5"),
    (dict(prompt=[]), "empty"),
    (dict(prompt=["a", "b"], negative_prompt=["c"]), "1 entries for 2 prompts"),
    (dict(output_type="jpeg"), "'jpeg'"),
])
def test_wrong_arguments_of_a_pipeline_are_named(flux_pipe, arguments, message):
    with pytest.raises(UserError, match=message):
        flux_pipe(**{**dict(prompt="a dog", height=32, width=32, num_inference_steps=1), **arguments})


def test_missing_network_is_named_with_the_file_that_brings_it():
    with pytest.raises(UserError, match=r"needs 'dit' .* add flux1-dev.safetensors or transformer/"):
        FluxImagePipeline()(prompt="a dog", height=32, width=32)


def test_unknown_argument_is_refused(flux_pipe):
    with pytest.raises(TypeError, match="promt_embeds"):
        flux_pipe(prompt="a dog", promt_embeds=torch.zeros(1))


@pytest.fixture(scope="module")
def flux_pipe(flux_folder):
    from tests.tiny_flux import model_files

    return FluxImagePipeline.from_pretrained(torch.float32, "cpu", model_files(flux_folder))


def test_long_prompt_is_cut_with_a_warning(flux_pipe, caplog):
    flux_pipe(
        prompt="a dog " * 30, height=16, width=16, num_inference_steps=1, max_sequence_length=8, progress_bar_cmd=iter)
    assert "longer than the 8 tokens" in caplog.text
