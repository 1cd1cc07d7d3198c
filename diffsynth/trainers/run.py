"""A training run of any family, from its options to its last checkpoint.

Everything that can be checked is checked before a model is loaded: options against each other, files, data set,
device. Then pipeline, training module and logger are built and handed to the one training loop.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import TrainConfig
from ..core.errors import UserError
from ..core.startup import collector_paused, keep_freed_memory

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..core.data import UnifiedDataset
    from ..core.loader import ModelConfig
    from ..diffusion.base_pipeline import BasePipeline
    from ..diffusion.training_module import DiffusionTrainingModule, PipelineTrainingModule
    from ..models.spec import ModelFamily


def train(config: TrainConfig) -> None:
    """Run the training that the options describe, under whatever launcher started this process.

    Raises:
        UserError: an option, a file or the data set is not as it must be; nothing has been written then.
    """
    family, configs, dataset = check_run(config)
    accelerator = build_accelerator(config)
    # no process may write before the others have looked at the output folder
    accelerator.wait_for_everyone()
    model = build_model(config, family, configs, accelerator.device)
    launch(config, accelerator, dataset, model)


@collector_paused(freeze=True)
def check_run(config: TrainConfig) -> tuple[ModelFamily, list[ModelConfig], UnifiedDataset]:
    """Check everything that can be checked without loading a model.

    Returns:
        The family, its model files, and the data set.
    Raises:
        UserError: an option, a file or the data set is not as it must be.
    """
    from ..core.device import choose_device
    from ..diffusion.checkpoint import check_output_folder

    check_options(config)
    check_output_folder(Path(config.output_path), config.resume)
    device = choose_device(config.device)
    if device.type == "cpu" and config.mixed_precision == "fp16":
        raise UserError("--mixed_precision fp16 needs a GPU; on the CPU use bf16 or no.")
    configs = model_configs(config)
    components = inspect_configs(configs)
    family = choose_family(config.family, components)
    dataset = build_dataset(config, division_factors(family, components))
    check_dataset(config, dataset)
    return family, configs, dataset


def launch(
    config: TrainConfig, accelerator: Accelerator, dataset: UnifiedDataset, model: DiffusionTrainingModule
) -> None:
    """Hand a loaded model and a checked data set to the training loop."""
    from ..diffusion.logger import ModelLogger
    from ..diffusion.runner import launch_training_task

    model_logger = ModelLogger(
        config.output_path, config.remove_prefix_in_ckpt, config.lora_format, config.keep_checkpoints,
        config.checkpoint_names, tensorboard=config.logger == "tensorboard",
    )
    launch_training_task(accelerator, dataset, model, model_logger, config)


def check_options(config: TrainConfig) -> None:
    """Options that a run needs, and options that would have no effect."""
    if not config.dataset_base_path and not config.dataset_metadata_path:
        raise UserError("no data set is given; set --dataset_base_path to its folder.")
    if not config.model_paths and not config.model_id_with_origin_paths:
        raise UserError("no model is given; set --model_paths or --model_id_with_origin_paths.")
    if not config.trainable_models and not config.lora_base_model:
        raise UserError("nothing would be trained; set --lora_base_model dit for a LoRA, or --trainable_models dit.")
    for needed, dependent in _NEEDS.items():
        for name in dependent:
            if config.origins[name] != "default" and not getattr(config, needed):
                default = TrainConfig.model_fields[name].default
                if getattr(config, name) != default:
                    raise UserError(f"--{name} has no effect without --{needed}; set --{needed} or leave --{name} out.")
    if config.use_gradient_checkpointing_offload and not config.use_gradient_checkpointing:
        raise UserError("--use_gradient_checkpointing_offload needs --use_gradient_checkpointing.")
    for name in ("lora_checkpoint", "preset_lora_path"):
        path = getattr(config, name)
        if path is not None and not Path(path).is_file():
            raise UserError(f"--{name}: there is no file {path}.")


_NEEDS = {
    "lora_base_model": ("lora_target_modules", "lora_rank", "lora_alpha", "lora_rslora", "lora_dora", "lora_dtype",
                        "lora_checkpoint"),
    "sample_prompts": ("sample_every", "sample_steps", "sample_cfg_scale"),
    "preset_lora_path": ("preset_lora_model",),
}
"""Option -> options that do nothing without it."""


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The ``accelerate`` object for this process."""
    import accelerate
    import torch

    from ..core.device import choose_device

    device = choose_device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    return accelerate.Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=device.type == "cpu",
        kwargs_handlers=[
            accelerate.DistributedDataParallelKwargs(
                find_unused_parameters=config.find_unused_parameters, gradient_as_bucket_view=True
            ),
            # the others wait while the main process draws previews and writes large checkpoints
            accelerate.InitProcessGroupKwargs(timeout=timedelta(hours=12)),
        ],
    )


def build_dataset(config: TrainConfig, factors: tuple[int, int]) -> UnifiedDataset:
    """The data set of the options, its pictures of a height and width that are multiples of ``factors``.

    Raises:
        UserError: the metadata is missing or damaged, or the asked-for height or width is no such multiple.
    """
    from ..core.data import UnifiedDataset

    operator = UnifiedDataset.default_image_operator(
        base_path=config.dataset_base_path,
        max_pixels=config.max_pixels,
        height=config.height,
        width=config.width,
        height_division_factor=factors[0],
        width_division_factor=factors[1],
        center_crop=config.center_crop,
        random_flip=config.random_flip,
    )
    return UnifiedDataset(
        config.dataset_base_path or None, config.dataset_metadata_path, config.dataset_repeat, config.data_file_keys,
        operator, seed=config.seed,
    )


def check_dataset(config: TrainConfig, dataset: UnifiedDataset) -> None:
    """Refuse a data set with missing columns, or with files that are missing, damaged or outside its folder."""
    from ..diffusion.training_module import PipelineTrainingModule

    dataset.require_columns(*PipelineTrainingModule.data_columns, *config.extra_inputs)
    for item in range(dataset.num_rows):
        if not isinstance(dataset.row(item).get("prompt"), str):
            raise UserError(f"{dataset.metadata_path or dataset.base_path}, row {item + 1}: the column 'prompt' holds "
                            f"{dataset.row(item).get('prompt')!r}; write one caption as text.")
    # what is encoded once is decoded then, before training; what is not has to be decoded now
    dataset.check("pixels" if config.cache == "off" else "headers")


def model_configs(config: Any) -> list[ModelConfig]:
    """Where the weights are, from ``model_paths`` and ``model_id_with_origin_paths``; both may be given.

    Repositories are downloaded here, so that the hub is asked once and everything afterwards is about local files.
    """
    from ..core.loader import ModelConfig

    paths = [ModelConfig(path=list(entry) if isinstance(entry, tuple) else entry) for entry in config.model_paths]
    downloaded = [_repository(entry).resolve() for entry in config.model_id_with_origin_paths]
    return paths + [ModelConfig(path=files[0] if len(files) == 1 else tuple(files)) for files in downloaded]


def _repository(entry: str) -> ModelConfig:
    from ..core.loader import ModelConfig

    model_id, _, pattern = entry.partition(":")
    return ModelConfig(model_id=model_id, origin_file_pattern=pattern)


def tokenizer_configs(family: ModelFamily, folder: str | None) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for tokenizers below one folder.

    Raises:
        UserError: the folder has no tokenizer of the family.
    """
    from ..core.loader import ModelConfig

    if folder is None:
        return {}
    found = {}
    for name, (_, subfolder) in family.tokenizers.items():
        path = Path(folder) / subfolder
        if not path.is_dir():
            if len(family.tokenizers) > 1 or not Path(folder).is_dir():
                raise UserError(f"--tokenizer_path {folder}: there is no folder {path}.")
            path = Path(folder)
        found[f"{name}_config"] = ModelConfig(path=path)
    return found


def inspect_configs(configs: Sequence[ModelConfig]) -> list[dict[str, Any]]:
    """What the headers of the model files say: one entry per component."""
    from ..models.inspection import inspect_files

    return [component for config in configs for component in inspect_files(config.resolve())["components"]]


def choose_family(name: str | None, components: Sequence[Mapping[str, Any]]) -> ModelFamily:
    """The family that is asked for, or the one that the model files belong to.

    Args:
        name: The ``family`` option.
        components: What ``inspect_configs`` says of the files.
    Raises:
        UserError: there is no such family, or the files belong to none or to several.
    """
    from ..models.registry import FAMILY_MODULES, get_family

    if name is not None:
        return get_family(name)
    found = sorted({component["family"] for component in components if component["family"] in FAMILY_MODULES})
    if len(found) == 1:
        return get_family(found[0])
    if not found:
        raise UserError(f"the model files do not say which family they belong to; add the denoiser's file, or name it "
                        f"with --family (known: {', '.join(FAMILY_MODULES)}).")
    raise UserError(f"the model files belong to several families ({', '.join(found)}); leave out those of the others.")


def load_pipeline_class(family: ModelFamily) -> type[BasePipeline]:
    module, _, name = family.pipeline.rpartition(".")
    return getattr(importlib.import_module(module), name)


def division_factors(family: ModelFamily, components: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """What height and width must be multiples of: an empty pipeline that knows the networks' configurations says so."""
    pipe = load_pipeline_class(family)()
    pipe.component_configs = {component["name"]: dict(component["config"]) for component in components}
    pipe.components_loaded()
    return pipe.height_division_factor, pipe.width_division_factor


@collector_paused()
def build_model(
    config: TrainConfig, family: ModelFamily, configs: Sequence[ModelConfig], device: Any
) -> PipelineTrainingModule:
    """Load the pipeline and make it ready for training."""
    from ..core.device import DTYPES
    from ..diffusion.training_module import PipelineTrainingModule

    pipe = load_pipeline_class(family).from_pretrained(
        DTYPES[config.mixed_precision], device, list(configs),
        # what is only needed to fill the cache is not even read when the cache is full
        deferred=[component.name for component in family.components],
        **tokenizer_configs(family, config.tokenizer_path),
    )
    return PipelineTrainingModule(pipe, config.replace(fp8_models=fp8_components(config, pipe)))


def fp8_components(config: TrainConfig, pipe: BasePipeline) -> tuple[str, ...]:
    """Names of the components that ``fp8_models`` means: given by name, by path, or by repository.

    Raises:
        UserError: an entry is none of the loaded models.
    """
    from ..core.loader import ModelConfig

    loaded = pipe.component_paths
    files = {name: {Path(path).resolve() for path in paths} for name, paths in loaded.items()}
    names: list[str] = []
    for entry in config.fp8_models:
        if entry in loaded:
            names.append(str(entry))
            continue
        is_path = not isinstance(entry, str) or Path(entry).exists() or ":" not in entry
        source = ModelConfig(path=entry) if is_path else _repository(str(entry))
        wanted = {path.resolve() for path in source.resolve()}
        matching = [name for name, paths in files.items()
                    if paths & wanted or any(folder in path.parents for folder in wanted for path in paths)]
        if not matching:
            raise UserError(f"--fp8_models {entry}: none of the loaded models ({', '.join(loaded)}) comes from there.")
        names += matching
    return tuple(dict.fromkeys(names))


@collector_paused()  # torch is imported here
def relaunch_on_all_gpus(
    device: str, command: Sequence[str], check: Callable[[], object] | None = None
) -> bool:
    """Start this command again under ``accelerate launch`` when several GPUs are visible and no launcher was used.

    Args:
        device: The ``device`` option; a particular device is used alone.
        command: What python runs, for example ``["train.py", "--lora_rank", "8"]`` or ``["-m", "diffsynth", ...]``.
        check: Called before the command is started again, so that bad input is reported once.
    Returns:
        Whether it was started again; the caller is then done. A failure ends this process with the same exit code.
    """
    if "LOCAL_RANK" in os.environ or device not in ("auto", "cuda"):
        return False
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return False
    if check is not None:
        check()
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1",
                "--num_processes", str(count), "--dynamo_backend", "no", "--multi_gpu"]
    is_module = command[0] == "-m"
    words = ["--module", *command[1:]] if is_module else list(command)
    finished = subprocess.run([*launcher, *words], check=False)
    if finished.returncode:
        sys.exit(finished.returncode)
    return True
