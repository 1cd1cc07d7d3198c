"""The quickstart's autoencoder: 4 times smaller latents of 16 channels, trained for sharp edges."""

from __future__ import annotations

import logging
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from scenes import SIZE, draw_clutter, example
from torch.nn import functional

logger = logging.getLogger(__name__)

# what FLUX applies to the latents of its autoencoder: (latents - SHIFT) * SCALE
SCALE, SHIFT = 0.3611, 0.1159
KL_WEIGHT = 3e-4
EDGE_WEIGHT = 1.0


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


def reconstruction_loss(autoencoder: torch.nn.Module, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """L1 of the pixels and of their differences to the right and downwards, and a weak pull of the latents to N(0, 1)."""
    posterior = autoencoder.encode(pixels).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator)
    decoded = autoencoder.decode(posterior.mean + posterior.std * noise).sample.float()
    loss = functional.l1_loss(decoded, pixels)
    for dim in (2, 3):
        loss = loss + EDGE_WEIGHT * functional.l1_loss(decoded.diff(dim=dim), pixels.diff(dim=dim))
    return loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()


def make_pictures(count: int, seed: int) -> torch.Tensor:
    """Half clutter, half scenes, as (count, 3, 64, 64) uint8."""
    pictures = [draw_clutter(i, seed) if i % 2 else example(i, seed)[0] for i in range(count)]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()


def draw_batch(pictures: torch.Tensor, step: int, steps: int, seed: int) -> torch.Tensor:
    """Pixels in [-1, 1]: 16 crops of 32 x 32, and whole pictures in the last two fifths."""
    rng = random.Random(f"autoencoder {seed} {step}")
    whole = step >= 0.6 * steps
    side, count = (SIZE, 4) if whole else (SIZE // 2, 16)
    batch = []
    for _ in range(count):
        top, left = rng.randrange(SIZE - side + 1), rng.randrange(SIZE - side + 1)
        picture = pictures[rng.randrange(len(pictures)), :, top : top + side, left : left + side]
        batch.append(picture.flip(2) if rng.random() < 0.5 else picture)
    return torch.stack(batch).float() / 127.5 - 1


def train_autoencoder(steps: int, seed: int, log_path: Path, learning_rate: float = 1.5e-3) -> torch.nn.Module:
    """Train from random weights; returns the average of the weights over the last steps, in eval mode."""
    torch.manual_seed(seed)
    autoencoder = build_autoencoder().train()
    pictures = make_pictures(8000, seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    averaged = torch.optim.swa_utils.AveragedModel(autoencoder, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    start, losses = time.monotonic(), []
    for step in range(steps):
        rate = learning_rate * min(1.0, (step + 1) / 200) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = reconstruction_loss(autoencoder, draw_batch(pictures, step, steps, seed), generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step > steps // 2:
            averaged.update_parameters(autoencoder)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            with log_path.open("a", encoding="utf-8") as log:
                log.write(f"{step + 1} {sum(losses[-100:]) / 100:.5f} {time.monotonic() - start:.0f} s\n")
        if (step + 1) % 1000 == 0:
            torch.save(autoencoder.state_dict(), log_path.with_suffix(".pt"))
    trained = averaged.module.eval()
    fold_latent_scale(trained, make_pictures(512, seed + 1))
    return trained


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
