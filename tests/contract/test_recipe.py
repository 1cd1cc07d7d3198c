"""The recipe is explicit: what training makes of seed, epoch, item, options and resolution is written down."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from diffsynth.core.random import keyed_items, keyed_seed, normal
from diffsynth.diffusion.checkpoint import find_state
from diffsynth.diffusion.loss import FlowMatchSFTLoss, flow_match_sample
from diffsynth.diffusion.loss_report import watch_losses
from diffsynth.diffusion.schedule import RECIPE_VERSION, RECIPES, TimestepSampling, noise_levels_given, training_recipe
from diffsynth.trainers.run import load_pipeline_class

from .make_recipe_goldens import goldens, path_of
from .tiny import FamilyAtWork


def assert_close(found: Any, expected: Any, place: str, tolerance: float) -> None:
    if isinstance(expected, dict):
        assert set(found) == set(expected), place
        for name, value in expected.items():
            assert_close(found[name], value, f"{place}.{name}", tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for index, value in enumerate(expected):
            assert_close(found[index], value, f"{place}[{index}]", tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=1e-6), place
    else:
        assert found == expected, place


def test_numbers_are_those_that_are_checked_in(family, tmp_path):
    """A failure means that old runs cannot be repeated: add a recipe under a new version instead."""
    written = json.loads(path_of(family.name).read_text(encoding="utf-8"))
    assert written["recipe_version"] in RECIPES
    found = goldens(family, tmp_path)
    assert_close(found, written, family.name, 1e-5)
    assert len(found["trace"]) == 20


@pytest.fixture(scope="module")
def pipe(family: FamilyAtWork) -> Any:
    return family.pipeline()


@pytest.fixture
def latents(pipe) -> torch.Tensor:
    with keyed_items(0, 0, [0, 1, 2]):
        return normal(pipe.latent_shape(3, 64, 48), "latents of the test")


def test_one_euler_step_with_the_true_velocity_returns_the_data(pipe, latents):
    for epoch in range(5):
        with keyed_items(9, epoch, [4, 5, 6]):
            sample = flow_match_sample(pipe, latents, None)
        sigmas = sample.levels.sigmas.view(-1, 1, 1, 1)
        assert torch.allclose(sample.noisy_latents - sigmas * sample.training_target, latents, atol=2e-6)
        assert torch.equal(sample.levels.timesteps, 1000 * sample.levels.sigmas)


def test_the_sampler_walks_the_path_of_the_training(pipe, latents):
    """The sampler's own Euler steps, fed with the true velocity, lead from the noise to the data."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    at = noise
    for timestep in pipe.set_timesteps(7, latents, 1.0):
        at = pipe.scheduler.step(noise - latents, timestep, at, return_dict=False)[0]
    assert torch.allclose(at, latents, atol=1e-5)


def test_loss_is_that_of_the_formula(pipe, latents):
    """arXiv:2210.02747 and arXiv:2403.03206, eq. 23, written out once more."""
    inputs = conditions(pipe, len(latents))
    seed, epoch, items = 3, 1, [8, 2, 5]
    with keyed_items(seed, epoch, items), torch.no_grad():
        loss = FlowMatchSFTLoss(pipe, input_latents=latents, **inputs).item()
    total = 0.0
    for row, item in enumerate(items):
        u = torch.rand((), generator=torch.Generator().manual_seed(keyed_seed(seed, epoch, item, "timestep"))).item()
        eps = torch.randn(latents.shape[1:],
                          generator=torch.Generator().manual_seed(keyed_seed(seed, epoch, item, "noise")))
        alpha = pipe.training_shift(latents)
        t = alpha * u / (1 + (alpha - 1) * u)
        x_t = (1 - t) * latents[row] + t * eps
        one = {name: value[row : row + 1] if isinstance(value, torch.Tensor) else value
               for name, value in inputs.items()}
        with torch.no_grad():
            v = pipe.predict_noise(latents=x_t[None], timesteps=torch.tensor([1000 * t]), **one)[0]
        total += ((v - (eps - latents[row])) ** 2).mean().item()
    assert loss == pytest.approx(total / len(items), rel=1e-5)


def conditions(pipe: Any, count: int) -> dict[str, Any]:
    """What the units make of prompts, for the network."""
    prompts = [f"picture {index}" for index in range(count)]
    # cut short by the tokenizers of the tiny networks
    shared, posi, _ = pipe.run_units(
        {"height": 64, "width": 48, "batch_size": count, "cfg_scale": 1, "max_sequence_length": 16},
        {"prompt": prompts}, {})
    return {name: value for name, value in {**shared, **posi}.items() if name not in ("noise", "latents")}


def test_neighbouring_timesteps_stay_apart_in_bfloat16(family):
    """bfloat16 has steps of 4 near 1000: cast anywhere before the embedding, these are the same noise level."""
    pipe = load_pipeline_class(family.family).from_pretrained(torch.bfloat16, "cpu", family.model_files)
    inputs = conditions(pipe, 1)
    latents = normal(pipe.latent_shape(1, 64, 48), "latents").to(torch.bfloat16)
    close = torch.tensor([[995.1], [997.4]])
    assert close[0].bfloat16() == close[1].bfloat16()
    with torch.no_grad():
        first, second = (pipe.predict_noise(latents=latents, timesteps=timestep, **inputs) for timestep in close)
    assert not torch.equal(first, second)


def test_timesteps_of_the_loss_are_float32_whatever_the_networks_are(family):
    pipe = load_pipeline_class(family.family).from_pretrained(torch.bfloat16, "cpu", family.model_files)
    given: list[torch.Tensor] = []
    predict = pipe.predict_noise

    def noted(**inputs: Any) -> torch.Tensor:
        given.append(inputs["timesteps"])
        return predict(**inputs)

    pipe.predict_noise = noted
    latents = normal(pipe.latent_shape(2, 64, 48), "latents").to(torch.bfloat16)
    with keyed_items(0, 0, [3, 4]), watch_losses() as seen, torch.no_grad():
        FlowMatchSFTLoss(pipe, input_latents=latents, **conditions(pipe, 2))
        expected = pipe.training_recipe(latents).timesteps
    (report,) = seen.pending
    assert given[0].dtype == report.timesteps.dtype == report.losses.dtype == torch.float32
    assert torch.equal(given[0], expected)
    assert report.dtypes == {"latents": torch.bfloat16, "noise_pred": torch.bfloat16}
    assert report.items == (3, 4)


def test_recipe_is_a_function_of_its_key(latents):
    sampling = TimestepSampling(kind="logit_normal")
    with keyed_items(1, 2, [3, 4]):
        first = training_recipe(sampling, 2, 1.5)
        torch.rand(7)
        again = training_recipe(sampling, 2, 1.5, version=RECIPE_VERSION)
    with keyed_items(1, 2, [4]):
        alone = training_recipe(sampling, 1, 1.5)
    assert torch.equal(first.sigmas, again.sigmas)
    assert torch.equal(alone.sigmas, first.sigmas[1:])


def test_given_noise_levels_are_taken_as_they_are():
    with noise_levels_given(torch.tensor([0.25, 0.5])):
        levels = training_recipe(TimestepSampling(weighting="bell"), 2, 3.0)
        with pytest.raises(ValueError, match="2 noise levels were given for 3 samples"):
            training_recipe(TimestepSampling(), 3, 3.0)
    assert levels.timesteps.tolist() == [250.0, 500.0]
    assert levels.weights.tolist() == [1.0, 1.0]


def test_files_of_a_run_name_the_recipe(family, pictures, tmp_path):
    from safetensors import safe_open

    family.train(pictures, tmp_path / "run", max_steps=1, save_steps=1)
    with safe_open(tmp_path / "run" / "step-1.safetensors", framework="pt") as file:
        assert f'"recipe_version": {RECIPE_VERSION}' in str(file.metadata()) or (
            f'recipe_version": {RECIPE_VERSION}' in json.dumps(file.metadata()).replace("\\", ""))
    state = find_state(tmp_path / "run", "auto")
    assert json.loads((state / "state.json").read_text(encoding="utf-8"))["options"]["recipe version"] == RECIPE_VERSION
