"""Witnesses of the training options."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from diffsynth.core import random
from diffsynth.core.device import choose_device
from diffsynth.trainers import run as trainers_run
from diffsynth.trainers.run import (
    build_dataset,
    build_model,
    check_run,
    choose_family,
    inspect_configs,
    model_configs,
)

from .lab import Lab
from .table import Witness
from .toy import Trace, loop, loop_again, with_unused_parameters


def digest(tensors: Any) -> str:
    hashing = hashlib.sha256()
    for tensor in tensors:
        hashing.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashing.hexdigest()


def _module(lab: Lab, options: dict[str, Any]) -> tuple[Any, Any]:
    config = lab.config(**options)
    with lab.offline_hub():
        configs = model_configs(config)
        family = choose_family(config.family, inspect_configs(configs))
        return config, build_model(config, family, configs, choose_device(config.device))


def built(lab: Lab, options: dict[str, Any]) -> dict[str, Any]:
    """The networks as training gets them."""
    _, module = _module(lab, options)
    trained = module.trainable_parameters()
    module.pipe.require_models(module.pipe.denoiser_models)
    denoiser = dict(module.pipe.denoiser.named_parameters())
    return {
        "trained": {name: (tuple(parameter.shape), parameter.dtype) for name, parameter in trained.items()},
        "weights": digest(trained.values()),
        "scales": {layer.scale for state in module.export_lora().values() for layer in state.layers.values()},
        "frozen": digest(p for name, p in denoiser.items() if "lora_" not in name and not p.requires_grad),
        "dtypes": {parameter.dtype for parameter in denoiser.values()},
    }


def forward(lab: Lab, options: dict[str, Any]) -> dict[str, Any]:
    """Loss of one item, and how much the forward pass keeps for the backward pass."""
    config, module = _module(lab, options)
    dataset = build_dataset(config, (module.pipe.height_division_factor, module.pipe.width_division_factor))
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.nbytes)
        return tensor

    item = module.collate([dataset[0]])
    with random.keyed_items(config.seed, 0, [0]), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        loss = module(item)
    loss.backward()
    return {"loss": loss.item(), "kept": sum(kept)}


def checked(lab: Lab, options: dict[str, Any]) -> str:
    """What is done before a model is loaded."""
    with lab.offline_hub():
        family, _, _ = check_run(lab.config(**options))
    return family.name


def inputs(lab: Lab, options: dict[str, Any]) -> list[str]:
    """What the pipeline is given of an item."""
    _, module = _module(lab, options)
    return sorted(module.pipeline_inputs({"image": [], "prompt": ["a"], "depth": ["b"]})[0])


def run(lab: Lab, options: dict[str, Any]) -> dict[str, Any]:
    """A whole run of the command."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    config = lab.config(**options)
    with lab.offline_hub():
        trainers_run.train(config)
    output = Path(config.output_path)
    weights = sorted(output.glob("*.safetensors"))
    keys = {}
    for path in weights:
        with safe_open(path, "pt") as file:
            keys[path.name] = sorted(file.keys())
    return {
        "files": sorted(path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()),
        "keys": keys,
        "pictures": {str(path.relative_to(output)): path.read_bytes() for path in (output / "samples").rglob("*.png")},
        "weights": {path.name: path.read_bytes() for path in weights},
    }


def in_the_default_cache(lab: Lab, options: dict[str, Any]) -> bool:
    """Whether a run has written to the cache in the models folder."""
    shutil.rmtree(lab.models_folder / "cache", ignore_errors=True)
    run(lab, {"cache_path": None, **options})
    return (lab.models_folder / "cache").exists()


def somewhere(lab: Lab, options: dict[str, Any]) -> list[str]:
    """Which of two folders a run has written to."""
    folders = {name: lab.fresh() for name in ("a", "b")}
    given = {name: str(folders[value]) if value in folders else value for name, value in options.items()}
    run(lab, given)
    return [name for name, folder in folders.items() if folder.exists()]


def column(name: str) -> Any:
    return lambda trace: trace.column(name)


def saw(name: str) -> Any:
    return lambda trace: trace.saw(name)


def part(name: str) -> Any:
    return lambda result: result[name]


def files(trace: Trace) -> list[str]:
    return trace.files


def weights(trace: Trace) -> list[float]:
    return trace.weights


def states(trace: Trace) -> tuple[str, list[int]]:
    return trace.ended, trace.column("step")


def spiking(lab: Lab) -> dict[str, Any]:
    """Two epochs, in the second of which the spike stands out of enough other losses."""
    return dict(dataset_base_path=lab.spiking, num_epochs=2, learning_rate=1e-6, **SGD)


SAMPLES = dict(sample_prompts="a dog", sample_steps=1)
SGD = dict(optimizer="SGD")

DATA = [
    Witness("dataset_base_path", lambda lab: lab.other_pictures, loop, saw("prompts")),
    Witness("dataset_metadata_path", lambda lab: lab.other_metadata, loop, saw("prompts")),
    Witness("data_file_keys", ("image", "second"), loop, saw("kinds"),
            base=lambda lab: dict(dataset_base_path=lab.with_second_picture)),
    Witness("dataset_repeat", 2, loop, column("step")),
    Witness("dataset_num_workers", 1, loop, saw("num_workers")),
    Witness("on_bad_item", "skip", loop, column("step"), base=lambda lab: dict(dataset_base_path=lab.damaged),
            refused=r"image_1\.png"),
    Witness("height", 48, loop, saw("sizes")),
    Witness("width", 48, loop, saw("sizes")),
    Witness("max_pixels", 1024, loop, saw("sizes"), base=dict(height=None, width=None)),
    Witness("center_crop", False, loop, saw("pixels")),
    Witness("random_flip", True, loop, saw("pixels")),
    Witness("caption_dropout", 1.0, loop, saw("prompts")),
]

LOOP = [
    Witness("learning_rate", 0.2, loop, column("lr")),
    Witness("num_epochs", 2, loop, column("epoch")),
    Witness("max_steps", 1, loop, column("step")),
    Witness("steps_per_epoch", 3, loop, column("step")),
    Witness("batch_size", 2, loop, saw("prompts"), base=dict(height=32, width=32)),
    Witness("seed", 4, loop, saw("prompts")),
    Witness("optimizer", "SGD", loop, weights),
    Witness("optimizer_args", {"betas": [0.1, 0.2]}, loop, weights),
    Witness("weight_decay", 0.5, loop, weights),
    Witness("lr_scheduler", "linear", loop, column("lr")),
    Witness("lr_warmup_steps", 2, loop, column("lr")),
    Witness("ema_decay", 0.9, loop, files),
    Witness("mixed_precision", "bf16", loop, saw("dtype")),
    Witness("device", "cuda:99", loop, refused="'cuda:99' was asked for"),
    Witness("find_unused_parameters", True, with_unused_parameters),
    Witness("gradient_accumulation_steps", 2, loop, column("items")),
    Witness("max_grad_norm", 1e-3, loop, weights, base=SGD),
    Witness("max_bad_steps", 2, loop, states, base=lambda lab: dict(dataset_base_path=lab.bad_captions)),
    Witness("loss_spike_factor", 0.0, loop, column("spike"), base=lambda lab: spiking(lab)),
    Witness("on_loss_spike", "rollback", loop, column("skipped"), base=lambda lab: spiking(lab)),
    Witness("validation_split", 1.0, loop, column("validation_loss")),
    Witness("validation_every", 2, loop, column("validation_loss"), base=dict(validation_split=1.0)),
    Witness("validation_timesteps", 3, loop, column("validation_loss_by_band"), base=dict(validation_split=1.0)),
    Witness("keep_best", True, loop, files, base=dict(validation_split=1.0)),
    Witness("save_steps", 2, loop, files),
    Witness("keep_checkpoints", 1, loop, files, base=dict(save_steps=1)),
    Witness("checkpoint_names", "older", loop, files),
    Witness("save_in_background", False, loop, lambda trace: set(trace.writers.values())),
    Witness("max_minutes", 1e-6, loop, states),
    Witness("resume", "auto", loop_again, column("step"), refused="holds another run|already holds"),
    Witness("logger", "tensorboard", loop, lambda trace: any("tensorboard" in name for name in trace.files)),
]

MODEL = [
    Witness("family", "nothing", checked, refused="no model family 'nothing'"),
    Witness("model_paths", lambda lab: lab.changed_models, forward, part("loss")),
    Witness("model_id_with_origin_paths", lambda lab: lab.repository, checked, base=dict(model_paths=()),
            refused="no model is given"),
    Witness("tokenizer_path", lambda lab: str(lab.family.folder), forward, part("loss"),
            base=lambda lab: dict(model_paths=lab.models_without_tokenizers), refused="tokenizer"),
    Witness("extra_inputs", ("depth",), inputs),
    Witness("fp8_models", lambda lab: (lab.denoiser,), built, part("dtypes")),
    Witness("preset_lora_path", lambda lab: lab.lora, built, part("frozen")),
    Witness("preset_lora_model", lambda lab: lab.encoder, built, part("frozen"),
            base=lambda lab: dict(preset_lora_path=lab.lora), refused="holds no layers of"),
    Witness("trainable_models", lambda lab: (lab.encoder,), built, part("trained")),
    Witness("embedded_guidance", 7.0, forward, part("loss")),
    Witness("max_sequence_length", 8, forward, part("loss")),
    Witness("timestep_sampling", "uniform", forward, part("loss")),
    Witness("timestep_shift", 9.0, forward, part("loss")),
    Witness("timestep_weighting", "bell", forward, part("loss")),
    Witness("use_gradient_checkpointing", True, forward, part("kept")),
    Witness("use_gradient_checkpointing_offload", True, forward, part("kept"),
            base=dict(use_gradient_checkpointing=True)),
]

LORA = [
    Witness("lora_base_model", lambda lab: lab.denoiser, built, part("trained"), base=lambda lab: dict(
        lora_base_model=None, lora_target_modules="", lora_rank=32, lora_alpha=None, trainable_models=(lab.encoder,))),
    Witness("lora_target_modules", "", built, part("trained")),
    Witness("lora_rank", 2, built, part("trained")),
    Witness("lora_alpha", 3.0, built, part("scales")),
    Witness("lora_rslora", True, built, part("scales")),
    Witness("lora_dora", True, built, part("trained")),
    Witness("lora_dtype", "bfloat16", built, part("trained")),
    Witness("lora_checkpoint", lambda lab: lab.lora, built, part("weights")),
    Witness("lora_format", "diffsynth", run, part("keys")),
]

OUTPUT = [
    Witness("task", "sft:data_process", run, part("files")),
    Witness("output_path", "b", somewhere, base=dict(output_path="a")),
    Witness("remove_prefix_in_ckpt", lambda lab: f"pipe.{lab.denoiser}.", run, part("keys")),
    Witness("cache", "off", in_the_default_cache),
    Witness("cache_path", "b", somewhere, base=dict(cache_path="a")),
    Witness("sample_prompts", "a dog", run, part("files")),
    Witness("sample_every", 2, run, part("files"), base=dict(**SAMPLES, max_steps=2, save_steps=1)),
    Witness("sample_steps", 2, run, part("pictures"), base=SAMPLES),
    Witness("sample_cfg_scale", 4.0, run, part("pictures"), base=SAMPLES),
]

TRAIN = [*DATA, *LOOP, *MODEL, *LORA, *OUTPUT]