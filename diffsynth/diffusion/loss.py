"""Training objectives: from the inputs that the units made to one number per batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..core import random
from .loss_report import report_losses
from .schedule import NoiseLevels, add_noise, velocity

if TYPE_CHECKING:
    from .base_pipeline import BasePipeline


@dataclass(frozen=True)
class TrainingSample:
    """What the network is given and what it is to answer, (B, C, h, w)."""

    noisy_latents: torch.Tensor
    training_target: torch.Tensor
    levels: NoiseLevels


def flow_match_sample(pipe: BasePipeline, latents: torch.Tensor, noise: torch.Tensor | None) -> TrainingSample:
    """Draw noise (unless it is given) and noise levels for clean latents, keyed inside ``random.keyed_items``."""
    if noise is None:
        noise = random.normal(latents.shape, "noise", latents.device)
    levels = pipe.training_recipe(latents)
    return TrainingSample(add_noise(latents, noise, levels.sigmas), velocity(latents, noise), levels)


def FlowMatchSFTLoss(pipe: BasePipeline, **inputs: Any) -> torch.Tensor:
    """Flow matching on clean latents: the network predicts ``noise - latents``.

    Args:
        pipe: Pipeline whose ``model_fn`` predicts; its ``timestep_sampling`` says which noise levels are visited.
        **inputs: What the units produced, with ``input_latents`` (B, C, h, w); ``noise`` is drawn when absent.
    Returns:
        Mean squared error over the batch, a float32 scalar.
    Source: Lipman et al. 2022, arXiv:2210.02747; Liu et al. 2022, arXiv:2209.03003.
    """
    latents: torch.Tensor = inputs.pop("input_latents")
    noise = inputs.pop("noise", None)
    sample = flow_match_sample(pipe, latents, noise)
    levels = sample.levels
    noise_pred = pipe.predict_noise(latents=sample.noisy_latents, timesteps=levels.timesteps, **inputs)
    if noise_pred.shape != latents.shape:
        raise ValueError(f"the network returned {tuple(noise_pred.shape)} for latents {tuple(latents.shape)}.")
    errors = torch.nn.functional.mse_loss(noise_pred.float(), sample.training_target, reduction="none")
    losses = errors.flatten(1).mean(1)
    report_losses(timesteps=levels.timesteps, losses=losses, weights=levels.weights, latents=latents,
                  noise_pred=noise_pred)
    return (losses * levels.weights).mean()
