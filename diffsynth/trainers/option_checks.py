"""Options that a run lacks, and options that it would not heed: refused before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import GenerateConfig, TrainConfig
from ..core.errors import UserError
from ..core.options import DEFAULT, Options

if TYPE_CHECKING:
    import torch

    from ..core.device import Machine
    from ..diffusion.base_pipeline import BasePipeline
    from ..models.spec import ModelFamily

NEEDS: dict[str, tuple[str, ...]] = {
    "lora_base_model": ("lora_target_modules", "lora_rank", "lora_alpha", "lora_rslora", "lora_dora", "lora_dtype",
                        "lora_checkpoint", "lora_format"),
    "sample_prompts": ("sample_every", "sample_steps", "sample_cfg_scale"),
    "validation_split": ("validation_every", "validation_timesteps", "keep_best"),
    "preset_lora_path": ("preset_lora_model",),
    "use_gradient_checkpointing": ("use_gradient_checkpointing_offload",),
    "loss_spike_factor": ("on_loss_spike",),
}
"""Option -> options that do nothing without it."""

NOT_BESIDE: tuple[tuple[str, str, Callable[[TrainConfig], bool]], ...] = (
    ("max_pixels", "beside --height and --width, which fix the size", lambda config: config.height is not None),
    ("cache_path", "with --cache off", lambda config: config.cache == "off"),
    ("lora_format", "beside --remove_prefix_in_ckpt, which asks for bare names; leave one of them out",
     lambda config: config.remove_prefix_in_ckpt is not None and config.lora_format != "diffsynth"
     and not config.trainable_models),
)
"""Option, what it does nothing beside, and when that is so."""


def check_options(config: TrainConfig) -> None:
    """Refuse what can be told from the options alone.

    Raises:
        UserError: something is missing, or an option was given that would have no effect.
    """
    if not config.dataset_base_path and not config.dataset_metadata_path:
        raise UserError("no data set is given; set --dataset_base_path to its folder.")
    if not config.model_paths and not config.model_id_with_origin_paths:
        raise UserError("no model is given; set --model_paths or --model_id_with_origin_paths.")
    if not config.trainable_models and not config.lora_base_model:
        raise UserError("nothing would be trained; set --lora_base_model dit for a LoRA, or --trainable_models dit.")
    for needed, dependent in NEEDS.items():
        for name in dependent:
            if is_chosen(config, name) and not getattr(config, needed):
                raise UserError(f"--{name} has no effect without --{needed}; set --{needed} or leave --{name} out.")
    for name, beside, holds in NOT_BESIDE:
        if is_chosen(config, name) and holds(config):
            raise UserError(f"--{name} has no effect {beside}.")
    if config.lr_scheduler == "constant_with_warmup" and not config.lr_warmup_steps:
        raise UserError("--lr_scheduler constant_with_warmup needs --lr_warmup_steps; set it, or use constant.")
    _check_prefix(config)
    for name in ("lora_checkpoint", "preset_lora_path"):
        path = getattr(config, name)
        if path is not None and not Path(path).is_file():
            raise UserError(f"--{name}: there is no file {path}.")


def is_chosen(options: Options, name: str) -> bool:
    """Whether an option was given, with another value than its default."""
    return options.origins[name] != DEFAULT and getattr(options, name) != type(options).model_fields[name].default


def _check_prefix(config: TrainConfig) -> None:
    prefix = config.remove_prefix_in_ckpt
    trained = [*config.trainable_models, *([config.lora_base_model] if config.lora_base_model else [])]
    names = [f"pipe.{name}." for name in trained]
    if prefix is not None and not any(name.startswith(prefix) for name in names):
        raise UserError(f"--remove_prefix_in_ckpt {prefix!r}: no name in the saved files begins so; they begin with "
                        f"{' or '.join(names)}.")


def check_inputs(options: TrainConfig | GenerateConfig, pipe: BasePipeline) -> None:
    """Refuse options that this model does not read.

    Args:
        options: Of a training, or of drawing pictures.
        pipe: A pipeline that knows its networks' configurations; they need not be loaded.
    Raises:
        UserError: names the option.
    """
    for name in ("embedded_guidance", "max_sequence_length"):
        if name in type(options).model_fields and is_chosen(options, name) and not pipe.reads(name):
            raise UserError(f"--{name} has no effect on this model of the family {pipe.family_name}; leave it out.")
    extra: Iterable[str] = getattr(options, "extra_inputs", ())
    for name in extra:
        if not pipe.reads(name):
            raise UserError(f"--extra_inputs {name}: the family {pipe.family_name} reads no such input; leave it out.")


def check_precision(config: TrainConfig, family: ModelFamily, denoiser_models: Iterable[str]) -> None:
    """Refuse to compute a denoiser in a precision in which it overflows; other networks keep a safe one by themselves.

    Raises:
        UserError: names the precision and the network.
    """
    dtype = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}[config.mixed_precision]
    for component in family.components:
        if component.name in denoiser_models and dtype not in component.spec.safe_dtypes:
            safe = " or ".join(value for value, name in (("bf16", "bfloat16"), ("fp16", "float16"), ("no", "float32"))
                               if name in component.spec.safe_dtypes)
            raise UserError(f"--mixed_precision {config.mixed_precision}: {component.spec.kind} overflows in {dtype}; "
                            f"use {safe}.")


def capable_device(config: TrainConfig, machine: Machine | None = None) -> torch.device:
    """The device of the run, which can do all that the options ask of it.

    Args:
        machine: What the device can do, where that is known without asking torch.
    Raises:
        UserError: the device is not there, or cannot do something.
    """
    from ..core.device import Machine, choose_device

    precision, processes = config.mixed_precision, int(os.environ.get("WORLD_SIZE", "1"))
    asked = {
        "float16 training": "--mixed_precision fp16" if precision == "fp16" else None,
        "bfloat16": "--mixed_precision bf16" if precision == "bf16" else None,
        "float8 storage": "--fp8_models" if config.fp8_models else None,
        "several processes": f"training with {processes} processes" if processes > 1 else None,
    }
    device = choose_device(config.device)
    (machine or Machine.of(device)).require(asked)
    return device
