"""The older command line, mapped onto the options and the runner of the newer one.

An older training script derives its options from ``TextToImageOptions``, adds its ``pretrained_*_path`` fields, and
calls ``main``. Its checkpoints are ``{output_path}/lightning_logs/version_{n}/checkpoints/epoch={e}-step={s}.ckpt``.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ..config import TrainConfig
from ..core.command_line import run_front_door
from ..core.errors import UserError
from ..core.options import CommaText, Options, describe_type, union_members
from .run import (
    build_accelerator,
    build_dataset,
    build_model,
    check_dataset,
    check_run,
    launch,
    relaunch_on_all_gpus,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..core.data import UnifiedDataset
    from ..diffusion.training_module import DiffusionTrainingModule

logger = logging.getLogger(__name__)


class TextToImageOptions(Options):
    """General options of the older training scripts."""

    title: ClassVar[str] = "General"
    family: ClassVar[str | None] = None
    """Model family of the script; None recognises it from the files."""
    denoiser: ClassVar[str] = "dit"
    """Model that gets the LoRA."""
    lora_target_modules: CommaText = Field(
        "", description="Layers with LoRA modules. Left out: the family's usual layers."
    )
    dataset_path: str = Field(description="The path of the Dataset.")
    output_path: str = Field("./", min_length=1, description="Path to save the model.")
    steps_per_epoch: int = Field(500, ge=1, description="Number of steps per epoch.")
    height: int = Field(1024, ge=1, description="Image height.")
    width: int = Field(1024, ge=1, description="Image width.")
    center_crop: bool = Field(
        False, description="Crop at the centre of the resized image. If not set, images are cropped at random places."
    )
    random_flip: bool = Field(False, description="Whether to randomly flip images horizontally.")
    batch_size: int = Field(1, ge=1, description="Batch size (per device) for the training dataloader.")
    dataloader_num_workers: int = Field(
        0, ge=0, description="Number of subprocesses to use for data loading. 0 loads in the main process."
    )
    precision: Literal["32", "16", "16-mixed", "bf16"] = Field("16-mixed", description="Training precision.")
    learning_rate: float = Field(1e-4, gt=0, description="Learning rate.")
    lora_rank: int = Field(4, ge=1, description="The dimension of the LoRA update matrices.")
    lora_alpha: float = Field(4.0, gt=0, description="The weight of the LoRA update matrices.")
    use_gradient_checkpointing: bool = Field(False, description="Whether to use gradient checkpointing.")
    accumulate_grad_batches: int = Field(1, ge=1, description="The number of batches in gradient accumulation.")
    training_strategy: Literal["auto", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"] = Field(
        "auto", description="Training strategy."
    )
    max_epochs: int = Field(1, ge=1, description="Number of epochs.")
    modelscope_model_id: str | None = Field(
        None, description="Model ID on ModelScope (https://www.modelscope.cn/). The model is uploaded to it if given."
    )
    modelscope_access_token: str | None = Field(
        None, description="Access key on ModelScope. Required to upload the model."
    )
    align_to_opensource_format: bool = Field(
        False, description="Export the LoRA under the layer names that other programs read."
    )
    quantize: Literal["float8_e4m3fn"] | None = Field(
        None, description="Keep the frozen weights of the denoiser in this type, which saves memory."
    )
    seed: int = Field(0, ge=0, description="Seed of everything that is drawn at random.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...; auto takes the GPUs where there are any.")

    def pretrained_paths(self) -> dict[str, list[str]]:
        """Option -> files of each ``pretrained_*_path`` option that is given."""
        fields = [name for name in type(self).model_fields if _is_path_option(name)]
        return {name: str(getattr(self, name)).split(",") for name in fields if getattr(self, name) is not None}

    def to_config(self, version_folder: Path) -> TrainConfig:
        """The same run in the words of the newer generation."""
        values = {newer: getattr(self, older) for older, newer in RENAMED.items()}
        values |= {newer: convert(getattr(self, older)) for older, (newer, convert) in CONVERTED.items()}
        paths = self.pretrained_paths()
        denoiser = [path for name, listed in paths.items() if _DENOISER.fullmatch(name) for path in listed]
        return TrainConfig(
            family=type(self).family,
            model_paths=tuple(path for listed in paths.values() for path in listed),
            fp8_models=tuple(denoiser) if self.quantize else (),
            data_file_keys=("image",),
            lora_base_model=type(self).denoiser,
            output_path=str(version_folder),
            checkpoint_names="older",
            **values,
        )


_DENOISER = re.compile(r"pretrained_((dit|unet)_)?path")

def _is_path_option(name: str) -> bool:
    return name.startswith("pretrained_") and name.endswith("path")


RENAMED = {
    "lora_target_modules": "lora_target_modules",
    "dataset_path": "dataset_base_path",
    "steps_per_epoch": "steps_per_epoch",
    "height": "height",
    "width": "width",
    "center_crop": "center_crop",
    "random_flip": "random_flip",
    "batch_size": "batch_size",
    "dataloader_num_workers": "dataset_num_workers",
    "learning_rate": "learning_rate",
    "lora_rank": "lora_rank",
    "lora_alpha": "lora_alpha",
    "use_gradient_checkpointing": "use_gradient_checkpointing",
    "accumulate_grad_batches": "gradient_accumulation_steps",
    "max_epochs": "num_epochs",
    "seed": "seed",
    "device": "device",
}
"""Older option -> newer option of the same meaning."""

CONVERTED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "precision": (
        "mixed_precision", {"32": "no", "16": "fp16", "16-mixed": "fp16", "bf16": "bf16"}.__getitem__
    ),
    "align_to_opensource_format": ("lora_format", {True: "auto", False: "diffsynth"}.__getitem__),
}
"""Older option -> newer option, and how the value changes."""


def main(options: type[TextToImageOptions], example: str, words: Sequence[str] | None = None) -> None:
    """The whole of an older training script: options from the command line, training, exit code.

    Args:
        options: The script's options.
        example: Lines shown under the help.
        words: Command line without the script's name; None for that of this process.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = sys.argv[1:] if words is None else words
    run_front_door(lambda: run(options.from_command_line(words, Path(sys.argv[0]).name, example), words))


def run(options: TextToImageOptions, words: Sequence[str] = ()) -> None:
    """Check, load and train; several visible GPUs are used without a launcher.

    Raises:
        UserError: an option, a file or the data set is not as it must be; nothing has been written then.
    """
    _check_strategy(options.training_strategy)
    if options.modelscope_model_id:
        _check_upload(options)
    if not options.pretrained_paths():
        names = [name for name in type(options).model_fields if _is_path_option(name)]
        raise UserError(f"no model is given; set {', '.join(f'--{name}' for name in names)}.")
    config = options.to_config(next_version_folder(Path(options.output_path)))
    family, configs, dataset = check_run(config)
    if relaunch_on_all_gpus(options.device, [sys.argv[0], *words]):
        return
    accelerator = build_accelerator(config)
    model = build_model(config, family, configs, accelerator.device)
    _train(model, options, accelerator, dataset)


def launch_training_task(model: DiffusionTrainingModule, args: argparse.Namespace | TextToImageOptions) -> None:
    """Train a module that the caller has loaded, with the options of the older page.

    Args:
        model: A training module whose ``pipe`` is loaded and in training mode.
        args: What ``add_general_parsers`` and ``parse_args`` gave, or the options themselves. Other attributes of
            the namespace, such as the script's own, are left to the script.
    Raises:
        UserError: an option is wrong, or the data set is not as it must be.
    """
    if isinstance(args, TextToImageOptions):
        options = args
    else:
        own = {name: value for name, value in vars(args).items() if name in TextToImageOptions.model_fields}
        options = TextToImageOptions(**own)
    config = options.to_config(next_version_folder(Path(options.output_path)))
    dataset = build_dataset(config, (model.pipe.height_division_factor, model.pipe.width_division_factor))
    check_dataset(config, dataset)
    _train(model, options, build_accelerator(config), dataset)


def _train(
    model: DiffusionTrainingModule, options: TextToImageOptions, accelerator: Accelerator, dataset: UnifiedDataset
) -> None:
    config = options.to_config(_shared_version_folder(Path(options.output_path)))
    launch(config, accelerator, dataset, model)
    if options.modelscope_model_id and accelerator.is_main_process:
        _upload(options, Path(config.output_path) / "checkpoints")


def add_general_parsers(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Give a script's own parser the general options of the older page; values are checked when training starts."""
    group = parser.add_argument_group(TextToImageOptions.title)
    for name, field in TextToImageOptions.model_fields.items():
        default = "required" if field.is_required() else f"default: {field.get_default()}"
        shown = f"{field.description} ({describe_type(field)}; {default})".replace("%", "%%")
        if field.annotation is bool:
            group.add_argument(f"--{name}", action="store_true", help=shown)
        else:
            kind = next((kind for kind in union_members(field.annotation) if kind in (int, float)), str)
            default_value = None if field.is_required() else field.get_default()
            group.add_argument(f"--{name}", type=kind, default=default_value, required=field.is_required(), help=shown)
    return parser


def next_version_folder(output_path: Path) -> Path:
    """``{output_path}/lightning_logs/version_{n}`` with the first number that is not taken."""
    logs = output_path / "lightning_logs"
    taken = [int(found[1]) for path in logs.glob("version_*") if (found := re.fullmatch(r"version_(\d+)", path.name))]
    return logs / f"version_{max(taken, default=-1) + 1}"


def _shared_version_folder(output_path: Path) -> Path:
    """One folder for all processes, chosen by the main one."""
    from accelerate.utils import broadcast_object_list

    chosen = [str(next_version_folder(output_path))]
    broadcast_object_list(chosen)
    return Path(chosen[0])


def _check_strategy(strategy: str) -> None:
    if strategy != "auto":
        raise UserError(f"--training_strategy {strategy} is not supported yet; use auto, which takes all visible GPUs.")


def _check_upload(options: TextToImageOptions) -> None:
    import importlib.util

    if not options.modelscope_access_token:
        raise UserError("--modelscope_model_id needs --modelscope_access_token to upload the model.")
    if importlib.util.find_spec("modelscope") is None:
        raise UserError("--modelscope_model_id needs the package modelscope; install it with "
                        "pip install 'diffsynth[modelscope]'.")


def _upload(options: TextToImageOptions, folder: Path) -> None:
    from modelscope.hub.api import HubApi

    api = HubApi()
    api.login(options.modelscope_access_token)
    api.create_repo(options.modelscope_model_id, exist_ok=True)
    api.upload_folder(repo_id=options.modelscope_model_id, folder_path=str(folder))
    logger.info("uploaded %s to https://www.modelscope.cn/models/%s", folder, options.modelscope_model_id)
