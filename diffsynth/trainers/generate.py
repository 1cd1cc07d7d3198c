"""``diffsynth generate``: pictures from a prompt, drawn by the public pipeline, or a picture made again."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import GenerateConfig, PromptOptions
from ..core.errors import UserError, did_you_mean
from ..core.picture_file import picture_format, save_picture
from .option_checks import check_inputs
from .run import choose_family, inspect_configs, load_pipeline_class, model_configs, tokenizer_configs

if TYPE_CHECKING:
    from PIL import Image

    from ..core.loader import ModelConfig
    from ..diffusion.base_pipeline import BasePipeline
    from ..diffusion.drawing import LoraUse
    from ..diffusion.picture_recipe import PictureRecipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Drawing:
    """Everything that the pictures are made from."""

    config: GenerateConfig
    loras: list[LoraUse]
    models: list[ModelConfig]
    verified: PictureRecipe | None = None
    """Recipe whose model files have to be what they were."""
    index: int | None = None
    """Which picture of those drawn together is wanted; None for all."""


def generate(config: GenerateConfig) -> list[Path]:
    """Draw the pictures that the options describe and save them, with the recipe in each file.

    Returns:
        The files written.
    Raises:
        UserError: a model, a LoRA or the input picture is missing, of the wrong kind, or not the one that the picture
            was made from; or a size is not divisible.
    """
    from ..diffusion.drawing import describe_drawing, draw_pictures, load_loras

    picture_format(Path(config.output))  # before anything is read
    drawing = _again(config) if config.from_picture is not None else _anew(config)
    config = drawing.config
    outputs = output_paths(config.output, 1 if drawing.index is not None else config.num_images)
    options = PromptOptions(**{name: getattr(config, name) for name in PromptOptions.model_fields})
    if options.seed is None:
        options = options.replace(seed=secrets.randbelow(1 << 32))
    if config.negative_prompt and config.cfg_scale == 1:
        raise UserError("--negative_prompt has no effect while --cfg_scale is 1; set --cfg_scale above 1.")
    input_image = _read_input_image(config)
    pipe = _load_pipeline(drawing)
    check_inputs(config, pipe)
    load_loras(pipe, drawing.loras, pipe.fp8_models)
    recipe = describe_drawing(pipe, options, drawing.loras, pipe.fp8_models, config.tokenizer_path)
    drawn = list(enumerate(draw_pictures(pipe, options, input_image)))
    wanted = drawn if drawing.index is None else [drawn[drawing.index]]
    for (index, image), path in zip(wanted, outputs, strict=True):
        held = save_picture(image, path, recipe.text(index))
        logger.info("saved %s, seed %d%s", path, options.seed, "" if held else "; this format cannot say how it was "
                    "made, png, jpg and webp can")
    return outputs


def _anew(config: GenerateConfig) -> _Drawing:
    from ..diffusion.drawing import LoraUse

    if not config.model_paths and not config.model_id_with_origin_paths:
        raise UserError("no model is given; set --model_paths or --model_id_with_origin_paths.")
    return _Drawing(config, [LoraUse(*parse_lora(entry)) for entry in config.lora], model_configs(config))


def _again(config: GenerateConfig) -> _Drawing:
    """What a picture was made from, with the options that were given in the place of its own."""
    from ..core.data.image_file import read_size
    from ..diffusion.drawing import LoraUse
    from ..diffusion.picture_recipe import read_recipe

    source = Path(str(config.from_picture))
    recipe = read_recipe(source)
    given = {name for name, origin in config.origins.items() if origin != "default"}
    if read_size(source) != (recipe.options.height, recipe.options.width):
        raise UserError(f"{source} has another size than what it says about how it was made; another program has "
                        "changed it.")
    values = {name: value for name, value in recipe.picture.items() if name not in given}
    for name in ("family", "torch_dtype", "fp8_models", "tokenizer_path"):
        if name not in given:
            values[name] = getattr(recipe, name)
    if "device" not in given:
        values["device"] = _device_like(recipe.device, source)
    if "input_image" not in given and recipe.options.input_image is not None:
        _check_hash(Path(recipe.options.input_image), str(recipe.input_image_sha256), source, "--input_image")
    if "lora" in given:
        loras = [LoraUse(*parse_lora(entry)) for entry in config.lora]
    else:
        loras = [LoraUse(Path(lora.path), lora.strength) for lora in recipe.loras]
        for lora in recipe.loras:
            _check_hash(Path(lora.path), lora.sha256, source, "--lora")
    config = config.replace(**values)
    if given & {"model_paths", "model_id_with_origin_paths"}:
        models, verified = model_configs(config), None
    else:
        models, verified = _models_of(recipe, source), recipe
    index = None if "num_images" in given else recipe.index
    if index is not None and index >= config.num_images:
        raise UserError(f"{source}: picture {index} of {config.num_images} cannot be made; its recipe is damaged.")
    return replace(_Drawing(config, loras, models), verified=verified, index=index)


def _device_like(kind: str, source: Path) -> str:
    """The kind of device that a picture was drawn on, where this machine has one."""
    from ..core.device import choose_device

    try:
        return choose_device(kind).type
    except UserError:
        chosen = choose_device("auto").type
        logger.warning("%s was drawn on %s; on %s some of its pixels will be a little different", source, kind, chosen)
        return chosen


def _check_hash(path: Path, sha256: str, source: Path, option: str) -> None:
    from ..diffusion.drawing import sha256_of

    if not path.is_file():
        raise UserError(f"{source} was made with {path}, which is not there any more; name the file with {option}.")
    if sha256_of(path) != sha256:
        raise UserError(f"{source} was made with {path}, whose content is another one now; name a file with {option} "
                        "to draw with that.")


def _models_of(recipe: PictureRecipe, source: Path) -> list[ModelConfig]:
    from ..core.loader import ModelConfig

    groups = dict.fromkeys(component.paths for component in recipe.models)
    for path in (path for paths in groups for path in paths):
        if not Path(path).is_file():
            raise UserError(f"{source} was made with {path}, which is not there any more; name the model files with "
                            "--model_paths.")
    return [ModelConfig(path=paths[0] if len(paths) == 1 else paths) for paths in groups]


def _load_pipeline(drawing: _Drawing) -> BasePipeline:
    """Load what is needed, once it is known that the files are the ones that they have to be."""
    import torch

    from ..core.device import Machine, choose_device
    from ..core.memory import store_in_fp8

    config = drawing.config
    Machine.of(choose_device(config.device)).require({
        "bfloat16": "--torch_dtype bfloat16" if config.torch_dtype == "bfloat16" else None,
        "float8 storage": "--fp8_models" if config.fp8_models else None,
    })
    family = choose_family(config.family, [] if config.family else inspect_configs(drawing.models))
    names = [component.name for component in family.components]
    if unknown := sorted(set(config.fp8_models) - set(names)):
        raise UserError(f"--fp8_models {unknown[0]}: {family.name} has no such model; it has {', '.join(names)}."
                        f"{did_you_mean(unknown[0], names)}")
    pipe: Any = load_pipeline_class(family).from_pretrained(
        getattr(torch, config.torch_dtype), config.device, drawing.models,
        deferred=names if drawing.verified is not None else (), **tokenizer_configs(family, config.tokenizer_path))
    if drawing.verified is not None:
        _check_models(pipe, drawing.verified, str(config.from_picture))
        pipe.require_models(pipe.component_paths)
    pipe.fp8_models = tuple(config.fp8_models)
    pipe.require_models(pipe.fp8_models)
    for name in pipe.fp8_models:
        store_in_fp8(getattr(pipe, name))
    return pipe


def _check_models(pipe: BasePipeline, recipe: PictureRecipe, source: str) -> None:
    from ..diffusion.picture_recipe import fingerprint_text

    for model in recipe.models:
        found = pipe.component_fingerprints.get(model.component)
        if found is None or fingerprint_text(found) != model.fingerprint:
            raise UserError(f"{source} was made with {', '.join(model.paths)}, whose content is another one now; name "
                            "the model files with --model_paths to draw with those.")


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


def output_paths(output: str, num_images: int) -> list[Path]:
    """One file for each picture, numbered when there are several.

    Raises:
        UserError: the ending names no picture format that can be written.
    """
    path = Path(output)
    picture_format(path)
    if num_images == 1:
        return [path]
    return [path.with_stem(f"{path.stem}_{index}") for index in range(num_images)]


def _read_input_image(config: GenerateConfig) -> Image.Image | None:
    if config.input_image is None:
        if config.denoising_strength != 1:
            raise UserError("--denoising_strength has no effect without --input_image.")
        return None
    if config.denoising_strength == 1:
        raise UserError("--input_image has no effect while --denoising_strength is 1, which redraws all of it; set "
                        "--denoising_strength below 1.")
    from ..core.data.image_file import read_image

    return read_image(Path(config.input_image))
