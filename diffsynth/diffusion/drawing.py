"""How ``diffsynth generate`` and the sample pictures of a run draw: one way, so that they come to the same picture."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import PromptOptions
from .picture_recipe import LoraFile, ModelFile, PictureRecipe, fingerprint_text

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from .base_pipeline import BasePipeline


@dataclass(frozen=True)
class LoraUse:
    """A LoRA file and how strongly it acts; 1 is as trained."""

    path: Path
    strength: float = 1.0


def load_loras(pipe: BasePipeline, loras: Sequence[LoraUse], fp8_models: Collection[str]) -> None:
    """Load each file into every network that it holds layers of.

    They are fused into the weights, except into float8 ones, whose steps are too large for that.

    Raises:
        UserError: a file is no LoRA of these networks.
    """
    from ..adapters.lora import load_lora_file

    for lora in loras:
        for name in load_lora_file(lora.path, pipe.family()):
            pipe.require_models([name])
            pipe.load_lora(getattr(pipe, name), lora.path, alpha=lora.strength, hotload=name in fp8_models)


def draw_pictures(
    pipe: BasePipeline, options: PromptOptions, input_image: Image.Image | None = None,
    encoded: Mapping[str, torch.Tensor] | None = None, progress_bar_cmd: Callable | None = None,
) -> list[Image.Image]:
    """Call the public pipeline.

    Args:
        pipe: A pipeline with everything loaded.
        options: What is drawn; its seed is given.
        input_image: Picture to start from.
        encoded: Outputs of the units that encode the prompt, where they are known.
        progress_bar_cmd: Wraps the timesteps; default the pipeline's.
    """
    arguments: dict[str, Any] = {**options.model_dump(), "input_image": input_image, **(encoded or {})}
    if progress_bar_cmd is not None:
        arguments["progress_bar_cmd"] = progress_bar_cmd
    drawn = pipe(**arguments)
    return drawn if isinstance(drawn, list) else [drawn]


def describe_drawing(
    pipe: BasePipeline, options: PromptOptions, loras: Sequence[LoraUse], fp8_models: Collection[str] = (),
    tokenizer_path: str | None = None,
) -> PictureRecipe:
    """The recipe of the pictures that ``draw_pictures`` makes now."""
    from .. import __version__

    picture = options.model_dump(mode="json")
    source = options.input_image and Path(options.input_image).absolute()
    return PictureRecipe(
        version=1, diffsynth=__version__, family=pipe.family_name, device=pipe.device.type,
        torch_dtype=str(pipe.torch_dtype).removeprefix("torch."),  # type: ignore[arg-type]
        picture={**picture, "input_image": str(source) if source else None}, index=0,
        input_image_sha256=sha256_of(source) if source else None,
        models=tuple(
            ModelFile(component=name, fingerprint=fingerprint_text(pipe.component_fingerprints[name]),
                      paths=tuple(str(Path(path).absolute()) for path in paths))
            for name, paths in pipe.component_paths.items()),
        fp8_models=tuple(sorted(fp8_models)),
        tokenizer_path=str(Path(tokenizer_path).absolute()) if tokenizer_path else None,
        loras=tuple(LoraFile(path=str(lora.path.absolute()), strength=lora.strength, sha256=sha256_of(lora.path))
                    for lora in loras),
    )


def sha256_of(path: Path) -> str:
    """Of a file's whole content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
