"""Witnesses of the older command line: each option becomes something else in the words of the newer one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from diffsynth.trainers.text_to_image import TextToImageOptions, next_version_folder, run

from .lab import Lab
from .table import Witness


class ScriptOptions(TextToImageOptions):
    """What a script of the older page reads."""

    pretrained_dit_path: str | None = Field("denoiser.safetensors", description="Path of the denoiser.")


def becomes(lab: Lab, options: dict[str, Any]) -> dict[str, Any]:
    """The newer options, whose own witnesses show what they do."""
    given = ScriptOptions(**{"dataset_path": "data", **options})
    return given.to_config(next_version_folder(Path(given.output_path))).model_dump()


def started(lab: Lab, options: dict[str, Any]) -> None:
    """The script, which ends at the missing file at the latest."""
    run(ScriptOptions(**{"dataset_path": lab.two_pictures, "output_path": str(lab.folder / "never"), "precision": "32",
                         "device": "cpu", **options}))


_NEWER = {
    "dataset_path": "other", "output_path": "elsewhere", "steps_per_epoch": 7, "height": 64, "width": 64,
    "center_crop": True, "random_flip": True, "batch_size": 2, "dataloader_num_workers": 2, "precision": "bf16",
    "learning_rate": 1e-3, "lora_target_modules": "to_q", "lora_rank": 8, "lora_alpha": 8.0,
    "use_gradient_checkpointing": True, "accumulate_grad_batches": 2, "max_epochs": 2,
    "align_to_opensource_format": True, "quantize": "float8_e4m3fn", "seed": 1, "device": "cpu",
}
OLDER = [
    *(Witness(option, value, becomes) for option, value in _NEWER.items()),
    Witness("training_strategy", "deepspeed_stage_2", started, refused="denoiser.safetensors|deepspeed_stage_2 is not"),
    Witness("modelscope_model_id", "me/dog", started, refused="denoiser.safetensors|needs --modelscope_access_token"),
    Witness("modelscope_access_token", "x", started, base=dict(modelscope_model_id="me/dog"),
            refused="denoiser.safetensors|needs --modelscope_access_token"),
]
