"""The quickstart's autoencoder: 4 times smaller latents of 16 channels, trained for sharp edges.

It is trained by the same loop as everything else: ``AutoencoderTraining`` only brings its own loss and pictures.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scenes import SIZE, draw_clutter, example
from torch.nn import functional

from diffsynth import FluxImagePipeline
from diffsynth.core.random import normal
from diffsynth.diffusion.logger import ModelLogger
from diffsynth.diffusion.runner import launch_training_task
from diffsynth.diffusion.training_module import DiffusionTrainingModule

# what FLUX applies to the latents of its autoencoder: (latents - SHIFT) * SCALE
SCALE, SHIFT = 0.3611, 0.1159
KL_WEIGHT = 3e-4


def build_autoencoder() -> torch.nn.Module:
    """A small ``AutoencoderKL`` with FLUX's layout: 16 latent channels, no 1x1 convolutions around the latents."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    channels = (32, 64, 64)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


class AutoencoderTraining(DiffusionTrainingModule):
    """A pipeline of which only the autoencoder is there, and is trained."""

    def __init__(self, autoencoder: torch.nn.Module) -> None:
        super().__init__()
        self.pipe = FluxImagePipeline("cpu", torch.float32)
        self.pipe.vae = autoencoder
        self.switch_pipe_to_training_mode(self.pipe, trainable_models="vae")

    @staticmethod
    def collate(items: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(items)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """L1 of pixels and of edges (differences to the right and downwards); weak pull of the latents to N(0, 1)."""
        posterior = self.pipe.vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * normal(posterior.mean.shape, "posterior")
        decoded = self.pipe.vae.decode(latents).sample.float()
        loss = functional.l1_loss(decoded, pixels)
        for dim in (2, 3):
            loss = loss + functional.l1_loss(decoded.diff(dim=dim), pixels.diff(dim=dim))
        return loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()


class Crops(torch.utils.data.Dataset):
    """Pixels (3, side, side) in [-1, 1], cut at random from pictures of clutter and of scenes."""

    def __init__(self, pictures: torch.Tensor, side: int, count: int, seed: int) -> None:
        self.pictures, self.side, self.count, self.seed = pictures, side, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        rng = random.Random(f"crop {self.seed} {index}")
        top, left = rng.randrange(SIZE - self.side + 1), rng.randrange(SIZE - self.side + 1)
        picture = self.pictures[rng.randrange(len(self.pictures))]
        picture = picture[:, top : top + self.side, left : left + self.side]
        return (picture.flip(2) if rng.random() < 0.5 else picture).float() / 127.5 - 1


def make_pictures(count: int, seed: int, nested: bool = False) -> torch.Tensor:
    """Half clutter, half scenes, as (count, 3, 64, 64) uint8."""
    pictures = [draw_clutter(i, seed, nested) if i % 2 else example(i, seed)[0] for i in range(count)]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()


def train_autoencoder(folder: Path, steps: int, seed: int) -> torch.nn.Module:
    """Train on crops, then on whole pictures, then the decoder alone on finer ones; latents of FLUX's scale."""
    torch.manual_seed(seed)
    module = AutoencoderTraining(build_autoencoder())
    pictures = make_pictures(8000, seed)
    train_part(module, folder / "crops", pictures, SIZE // 2, 16, round(0.5 * steps), seed,
               lr_scheduler="constant_with_warmup", learning_rate=1.5e-3)  # fmt: skip
    train_part(module, folder / "whole", pictures, SIZE, 4, round(0.2 * steps), seed,
               lr_scheduler="cosine", learning_rate=7e-4)  # fmt: skip
    train_decoder(module, folder / "decoder", round(0.3 * steps), seed)
    autoencoder = module.pipe.vae.eval().requires_grad_(False)
    fold_latent_scale(autoencoder, make_pictures(512, seed + 1))
    return autoencoder


def train_decoder(module: AutoencoderTraining, folder: Path, steps: int, seed: int) -> None:
    """Train the decoder alone, so that the latents stay what they are."""
    module.pipe.vae.encoder.requires_grad_(False)
    train_part(module, folder, make_pictures(8000, seed + 2, nested=True), SIZE, 4, steps, seed,
               lr_scheduler="cosine", learning_rate=1e-3)  # fmt: skip


def train_part(
    module: AutoencoderTraining, folder: Path, pictures: torch.Tensor, side: int, batch_size: int, steps: int,
    seed: int, **options: Any,
) -> None:
    """One run of the training loop on crops of one size."""
    import accelerate

    launch_training_task(
        accelerate.Accelerator(mixed_precision="bf16", cpu=True),
        Crops(pictures, side, steps * batch_size, seed),
        module,
        ModelLogger(folder, keep_checkpoints=1),
        batch_size=batch_size,
        lr_warmup_steps=100,
        optimizer_args={"betas": [0.9, 0.99]},
        save_steps=500,
        seed=seed,
        **options,
    )


@torch.no_grad()
def fold_latent_scale(autoencoder: torch.nn.Module, pictures: torch.Tensor) -> None:
    """Rescale the latents inside the first and last convolutions so that FLUX's scale gives unit variance.

    Only the scale: a shift would not survive the zero padding of the decoder's first convolution, and FLUX's own
    shift leaves a mean of 0.04, which does no harm.
    """
    latents = torch.cat([autoencoder.encode(part.float() / 127.5 - 1).latent_dist.mean for part in pictures.split(32)])
    factor = 1.0 / (SCALE * latents.std())
    moments, first = autoencoder.encoder.conv_out, autoencoder.decoder.conv_in
    moments.weight[: latents.shape[1]] *= factor
    moments.bias[: latents.shape[1]] *= factor
    moments.bias[latents.shape[1] :] += 2 * torch.log(factor)  # the second half is the logarithm of the variance
    first.weight /= factor
