"""The rectified-flow path: how clean latents and noise are blended, and which noise levels training visits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch

from ..core import random
from ..core.errors import UserError

TimestepSamplingName = Literal["uniform", "logit_normal", "shifted"]

RECIPE_VERSION = 1
"""Of the numbers that training makes of (seed, epoch, item, configuration, resolution): noise levels, weights, noisy
latents, target. Whoever changes any of them adds a function to ``RECIPES`` under a new number and leaves the old one
as it is; the goldens in ``tests/data/recipes`` hold every number to its values."""


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Blend clean latents with noise along the rectified-flow path.

    Args:
        latents: Clean latents, (B, C, h, w) or (B, C, f, h, w).
        noise: Standard normal, same shape.
        sigmas: Noise level per sample, (B,), float32, 0 = clean and 1 = pure noise.
    Returns:
        ``(1 - sigmas) * latents + sigmas * noise`` in the dtype of ``latents``.
    Raises:
        ValueError: ``sigmas`` is not one value per sample.
    Source: Liu et al. 2022, arXiv:2209.03003.
    """
    if sigmas.shape != latents.shape[:1]:
        raise ValueError(f"sigmas has shape {tuple(sigmas.shape)}, but the batch holds {latents.shape[0]} samples.")
    sigmas = sigmas.view(-1, *[1] * (latents.ndim - 1))
    return ((1 - sigmas) * latents.float() + sigmas * noise.float()).to(latents.dtype)


def velocity(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Training target of rectified flow, ``noise - latents``, float32. Source: arXiv:2209.03003."""
    return noise.float() - latents.float()


def shift_sigmas(sigmas: torch.Tensor, shift: float) -> torch.Tensor:
    """Move noise levels towards 1 (shift > 1) or 0; ``shift = exp(mu)``.

    Source: Esser et al., arXiv:2403.03206, eq. 23.
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


@dataclass(frozen=True, kw_only=True)
class TimestepSampling:
    """Which noise levels training visits, and how much each counts."""

    kind: TimestepSamplingName = "shifted"
    """``uniform``: every sigma alike. ``logit_normal``: sigmoid of a standard normal (arXiv:2403.03206, section 3.1).
    ``shifted``: uniform, then moved as the family's sampler moves them at this resolution."""
    shift: float | None = None
    """Shift applied after drawing; None means the family's for ``shifted`` and 1 for the other two."""
    weighting: Literal["none", "bell"] = "none"
    """``bell`` weights the loss by a Gaussian around sigma = 0.5 with mean weight 1."""

    def __post_init__(self) -> None:
        if self.shift is not None and self.shift <= 0:
            raise UserError(f"timestep_shift must be above 0, got {self.shift}.")

    def sample_sigmas(self, batch_size: int, family_shift: float) -> torch.Tensor:
        """Noise levels in (0, 1), (B,), float32, keyed by item inside ``random.keyed_items``."""
        if self.kind == "logit_normal":
            sigmas = torch.sigmoid(random.normal((batch_size,), "timestep"))
        else:
            sigmas = random.uniform((batch_size,), "timestep")
        shift = self.shift if self.shift is not None else family_shift if self.kind == "shifted" else 1.0
        # the open interval: at 0 the target could not be told from the input, and a network never sees exactly 0
        return shift_sigmas(sigmas, shift).clamp(1e-4, 1.0)

    def weights(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Weight of each sample in the loss, (B,), float32."""
        if self.weighting == "none":
            return torch.ones_like(sigmas)
        width = 0.25
        # mean of the Gaussian over [0, 1], so that the average weight of uniform sigmas is 1
        mean = width * math.sqrt(2 * math.pi) * math.erf(0.5 / (width * math.sqrt(2)))
        return torch.exp(-0.5 * ((sigmas - 0.5) / width) ** 2) / mean


@dataclass(frozen=True)
class NoiseLevels:
    """The noise level and the weight of each sample of a batch, all (B,), float32."""

    timesteps: torch.Tensor
    """1000 * sigma."""
    sigmas: torch.Tensor
    weights: torch.Tensor
    """Weight of the sample's error in the mean."""


def _recipe_1(sampling: TimestepSampling, batch_size: int, family_shift: float) -> NoiseLevels:
    sigmas = sampling.sample_sigmas(batch_size, family_shift)
    return NoiseLevels(1000 * sigmas, sigmas, sampling.weights(sigmas))


RECIPES: Mapping[int, Callable[[TimestepSampling, int, float], NoiseLevels]] = {1: _recipe_1}
"""Every recipe there ever was, by version."""

_GIVEN: ContextVar[torch.Tensor | None] = ContextVar("diffsynth_given_sigmas", default=None)


def training_recipe(
    sampling: TimestepSampling, batch_size: int, family_shift: float, version: int = RECIPE_VERSION
) -> NoiseLevels:
    """The noise levels at which a batch is trained; a function of its arguments and of ``random.keyed_items`` alone.

    Args:
        sampling: What the options say.
        batch_size: Samples in the batch.
        family_shift: The family's shift at this resolution (``BasePipeline.training_shift``).
        version: One of ``RECIPES``.
    """
    sigmas = _GIVEN.get()
    if sigmas is None:
        return RECIPES[version](sampling, batch_size, family_shift)
    if sigmas.shape != (batch_size,):
        raise ValueError(f"{sigmas.shape[0]} noise levels were given for {batch_size} samples.")
    return NoiseLevels(1000 * sigmas, sigmas, torch.ones_like(sigmas))


@contextmanager
def noise_levels_given(sigmas: torch.Tensor) -> Iterator[None]:
    """Within this block ``training_recipe`` draws nothing: it gives these sigmas, (B,), float32, with weight 1."""
    token = _GIVEN.set(sigmas.float())
    try:
        yield
    finally:
        _GIVEN.reset(token)
