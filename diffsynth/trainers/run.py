"""A training run of any family, from its options to its last checkpoint.

Everything that can be checked is checked before a model is loaded: options against each other, files, data set,
device. Then pipeline, training module and logger are built and handed to the one training loop.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import TrainConfig
from ..core.errors import UserError
from ..core.startup import collector_paused, keep_freed_memory
from .option_checks import capable_device, check_inputs, check_options, check_precision

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..core.data import UnifiedDataset
    from ..core.data.row_checks import Depth
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
    from ..core.data.cache import check_cache_folder
    from ..diffusion.cache_fill import cache_folder
    from ..diffusion.checkpoint import check_output_folder

    check_options(config)
    check_output_folder(Path(config.output_path), config.resume)
    if config.cache != "off":
        check_cache_folder(cache_folder(config))
    capable_device(config)
    configs = model_configs(config)
    components = inspect_configs(configs)
    family = choose_family(config.family, components)
    pipe = empty_pipeline(family, components)
    dataset = build_dataset(config, (pipe.height_division_factor, pipe.width_division_factor))
    check_dataset(config, dataset)
    check_inputs(config, pipe)
    check_precision(config, family, pipe.denoiser_models)
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


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The ``accelerate`` object for this process."""
    import accelerate

    from ..core.device import is_cpu, use_from_now_on

    device = capable_device(config)
    use_from_now_on(device)
    if is_cpu(device):
        keep_freed_memory()
    return accelerate.Accelerator(
        mixed_precision=config.mixed_precision,
        cpu=is_cpu(device),
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
    """Refuse a data set with missing columns, or with rows that cannot be trained on; or leave these rows out."""
    from ..diffusion.progress import progress_bar
    from ..diffusion.training_module import PipelineTrainingModule

    dataset.require_columns(*PipelineTrainingModule.data_columns, *config.extra_inputs)
    skips = config.on_bad_item == "skip"
    if skips and os.environ.get("RANK", "0") != "0":
        return  # this process will leave out what the main one finds bad
    # what is encoded once is decoded then, before training; what is not has to be decoded now
    depth: Depth = "pixels" if skips or config.cache == "off" else "headers"
    with progress_bar(depth == "pixels") as bar:
        shown = bar.add_task("checking", total=None, loss="")
        bad_rows = dataset.bad_rows(depth, captions=("prompt",), required=config.extra_inputs,
                                    progress=lambda done, total: bar.update(shown, completed=done, total=total))
    if skips:
        dataset.exclude(bad_rows)
    else:
        dataset.refuse(bad_rows)


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


def empty_pipeline(family: ModelFamily, components: Sequence[Mapping[str, Any]]) -> BasePipeline:
    """A pipeline without networks, which knows their configurations: what sizes it takes, and which inputs it reads."""
    pipe = load_pipeline_class(family)()
    pipe.component_configs = {component["name"]: dict(component["config"]) for component in components}
    pipe.components_loaded()
    return pipe


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
    from ..core.device import may_use_all_gpus, num_gpus

    if "LOCAL_RANK" in os.environ or not may_use_all_gpus(device):
        return False
    count = num_gpus()
    if count < 2:
        return False
    if check is not None:
        check()
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1",
                "--num_processes", str(count), "--dynamo_backend", "no", "--multi_gpu"]
    is_module = command[0] == "-m"
    words = ["--module", *command[1:]] if is_module else list(command)
    from ..diffusion.stopping import run_launcher

    if code := run_launcher([*launcher, *words]):
        sys.exit(code)
    return True
