"""``diffsynth generate``: pictures from a prompt, drawn by the public pipeline."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import GenerateConfig
from ..core.errors import UserError
from .run import choose_family, inspect_configs, load_pipeline_class, model_configs, tokenizer_configs

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)


def generate(config: GenerateConfig) -> list[Path]:
    """Draw the pictures that the options describe and save them.

    Returns:
        The files written.
    Raises:
        UserError: a model, a LoRA or the input picture is missing or of the wrong kind, or a size is not divisible.
    """
    import torch

    outputs = output_paths(config)
    if not config.model_paths and not config.model_id_with_origin_paths:
        raise UserError("no model is given; set --model_paths or --model_id_with_origin_paths.")
    loras = [parse_lora(entry) for entry in config.lora]
    input_image = _read_input_image(config)
    configs = model_configs(config)
    family = choose_family(config.family, [] if config.family else inspect_configs(configs))
    pipe = load_pipeline_class(family).from_pretrained(
        getattr(torch, config.torch_dtype), config.device, configs, **tokenizer_configs(family, config.tokenizer_path)
    )
    for path, strength in loras:
        pipe.load_lora(pipe.denoiser, path, alpha=strength)
    drawn = pipe(
        prompt=config.prompt, negative_prompt=config.negative_prompt, cfg_scale=config.cfg_scale,
        embedded_guidance=config.embedded_guidance, height=config.height, width=config.width,
        num_inference_steps=config.num_inference_steps, seed=config.seed, input_image=input_image,
        denoising_strength=config.denoising_strength, num_images=config.num_images,
    )
    for image, path in zip(drawn if isinstance(drawn, list) else [drawn], outputs, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        logger.info("saved %s", path)
    return outputs


def parse_lora(entry: str) -> tuple[Path, float]:
    """``PATH`` or ``PATH:STRENGTH``.

    Raises:
        UserError: the file does not exist.
    """
    head, colon, tail = entry.rpartition(":")
    path, strength = Path(entry), 1.0
    if colon and not path.exists():
        try:
            path, strength = Path(head), float(tail)
        except ValueError:
            path = Path(entry)
    if not path.is_file():
        raise UserError(f"--lora {entry}: there is no file {path}; write PATH or PATH:STRENGTH.")
    return path, strength


def output_paths(config: GenerateConfig) -> list[Path]:
    """One file for each picture, numbered when there are several.

    Raises:
        UserError: the ending names no picture format that can be written.
    """
    from PIL import Image

    path = Path(config.output)
    Image.init()
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"--output {path}: {path.suffix or 'a name without ending'} is no picture format; use for "
                        f"example {path.with_suffix('.png').name}.")
    if config.num_images == 1:
        return [path]
    return [path.with_stem(f"{path.stem}_{index}") for index in range(config.num_images)]


def _read_input_image(config: GenerateConfig) -> Image.Image | None:
    if config.input_image is None:
        if config.denoising_strength != 1:
            raise UserError("--denoising_strength has no effect without --input_image.")
        return None
    from ..core.data.image_file import read_image

    return read_image(Path(config.input_image))
