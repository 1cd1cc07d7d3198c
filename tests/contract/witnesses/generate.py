"""Witnesses of the options of drawing pictures."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from PIL import Image

from diffsynth.config import GenerateConfig
from diffsynth.trainers.generate import generate

from .lab import Lab
from .table import Witness


def drawn(lab: Lab, options: dict[str, Any]) -> list[tuple[str, str, tuple[int, int], str]]:
    """Name, format, size and pixels of each picture that is written."""
    folder = lab.fresh()
    given = {**({} if "from_picture" in options else lab.drawing()), "output": "image.png", **options}
    given["output"] = str(folder / given["output"])
    with lab.offline_hub():
        paths = generate(GenerateConfig(**given))
    return [_described(path) for path in paths]


def nothing_given(lab: Lab, options: dict[str, Any]) -> list[tuple[str, str, tuple[int, int], str]]:
    """What is drawn of these options alone."""
    with lab.offline_hub():
        return [_described(path) for path in generate(GenerateConfig(output=str(lab.fresh() / "image.png"), **options))]


def _described(path: Path) -> tuple[str, str, tuple[int, int], str]:
    with Image.open(path) as picture:
        pixels = hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()
        return path.name, str(picture.format), picture.size, pixels


GENERATE = [
    Witness("from_picture", lambda lab: lab.drawn_picture, nothing_given, refused="no model is given"),
    Witness("output", "other.jpg", drawn),
    Witness("family", "nothing", drawn, refused="no model family 'nothing'"),
    Witness("model_paths", lambda lab: lab.changed_models, drawn),
    Witness("model_id_with_origin_paths", lambda lab: lab.repository, drawn, base=dict(model_paths=()),
            refused="no model is given"),
    Witness("tokenizer_path", lambda lab: str(lab.family.folder), drawn,
            base=lambda lab: dict(model_paths=lab.models_without_tokenizers), refused="tokenizer"),
    Witness("lora", lambda lab: lab.lora, drawn),
    Witness("fp8_models", lambda lab: lab.denoiser, drawn),
    Witness("torch_dtype", "bfloat16", drawn),
    Witness("device", "cuda:99", drawn, refused="'cuda:99' was asked for"),
    Witness("prompt", "a red circle", drawn),
    Witness("negative_prompt", "a toy", drawn, base=dict(cfg_scale=4.0)),
    Witness("cfg_scale", 4.0, drawn),
    Witness("embedded_guidance", 9.0, drawn),
    Witness("height", 48, drawn),
    Witness("width", 48, drawn),
    Witness("num_inference_steps", 3, drawn),
    Witness("seed", 2, drawn),
    Witness("num_images", 2, drawn),
    Witness("input_image", lambda lab: f"{lab.pictures}/image_0.png", drawn, base=dict(denoising_strength=0.5),
            refused="no effect without --input_image"),
    Witness("denoising_strength", 0.5, drawn, base=lambda lab: dict(
        input_image=f"{lab.pictures}/image_0.png", denoising_strength=0.9)),
]
