"""Training objectives: from the inputs that the units made to one number per batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..core import random
from .schedule import add_noise, velocity

if TYPE_CHECKING:
    from .base_pipeline import BasePipeline


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
    if noise is None:
        noise = random.normal(latents.shape, "noise", latents.device)
    sampling = pipe.timestep_sampling
    sigmas = sampling.sample_sigmas(latents.shape[0], pipe.training_shift(latents)).to(latents.device)
    noise_pred = pipe.predict_noise(latents=add_noise(latents, noise, sigmas), timesteps=1000 * sigmas, **inputs)
    if noise_pred.shape != latents.shape:
        raise ValueError(f"the network returned {tuple(noise_pred.shape)} for latents {tuple(latents.shape)}.")
    errors = torch.nn.functional.mse_loss(noise_pred.float(), velocity(latents, noise), reduction="none")
    return (errors.flatten(1).mean(1) * sampling.weights(sigmas)).mean()
