"""Units that every family uses: shape check, noise, input picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ..core import random
from ..core.errors import UserError
from .base_pipeline import pixels_from_images
from .unit import Inputs, PipelineUnit

if TYPE_CHECKING:
    from .base_pipeline import BasePipeline


class ShapeCheck(PipelineUnit):
    """Refuse sizes that the networks cannot represent."""

    inputs = ("height", "width")

    def process(self, pipe: BasePipeline, height: int, width: int) -> Inputs:  # type: ignore[override]
        for name, value, factor in (
            ("height", height, pipe.height_division_factor),
            ("width", width, pipe.width_division_factor),
        ):
            if value is None or value <= 0 or value % factor:
                nearest = max(factor, round((value or 0) / factor) * factor)
                raise UserError(f"{name} {value} is not a multiple of {factor}; the nearest that is: {nearest}.")
        return {}


class InitialNoise(PipelineUnit):
    """Draw the noise that a picture starts from."""

    inputs = ("height", "width", "seed", "rand_device", "batch_size")
    outputs = ("noise",)
    draws_noise = True

    def process(self, pipe: BasePipeline, **inputs: Any) -> Inputs:
        shape = pipe.latent_shape(inputs["batch_size"] or 1, inputs["height"], inputs["width"])
        device = torch.device(inputs["rand_device"] or "cpu")
        if inputs["seed"] is None:
            # in training: keyed by item; elsewhere torch's global generator, which torch.manual_seed sets
            noise = random.normal(shape, "noise", device)
        else:
            generator = torch.Generator(device).manual_seed(inputs["seed"])
            noise = torch.randn(shape, generator=generator, device=device, dtype=pipe.torch_dtype)
        return {"noise": noise.to(pipe.device, pipe.torch_dtype)}


class EncodeInputImage(PipelineUnit):
    """Latents of the picture to start from (inference) or to learn from (training)."""

    inputs = ("input_image", "height", "width")
    outputs = ("input_latents",)
    models = ("vae",)

    def process(self, pipe: BasePipeline, **inputs: Any) -> Inputs:
        images = inputs["input_image"]
        if images is None:
            return {}
        listed = [images] if isinstance(images, Image.Image) else list(images)
        size = (inputs["width"], inputs["height"])
        resized = [i if i.size == size else i.resize(size, Image.Resampling.LANCZOS) for i in listed]
        pixels = pixels_from_images(resized).to(pipe.device, pipe.torch_dtype)
        return {"input_latents": pipe.encode_pixels(pixels)}
