"""The older page: its command and its inference script, on a tiny model at the paths it names."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from .conftest import REPOSITORY

SCRIPT = str(REPOSITORY / "examples/train/flux/train_flux_lora.py")
# as printed, but for a smaller size and fewer steps
PRINTED = """
  --pretrained_text_encoder_path models/FLUX/FLUX.1-dev/text_encoder/model.safetensors
  --pretrained_text_encoder_2_path models/FLUX/FLUX.1-dev/text_encoder_2
  --pretrained_dit_path models/FLUX/FLUX.1-dev/flux1-dev.safetensors
  --pretrained_vae_path models/FLUX/FLUX.1-dev/ae.safetensors
  --dataset_path data/dog
  --output_path ./models
  --max_epochs 2
  --steps_per_epoch 7
  --height 32
  --width 32
  --center_crop
  --precision bf16
  --learning_rate 1e-2
  --lora_rank 16
  --lora_alpha 16
  --use_gradient_checkpointing
  --align_to_opensource_format
"""
COMMAND = PRINTED.split()
INFERENCE = """
from diffsynth import ModelManager, FluxImagePipeline
import torch

model_manager = ModelManager(torch_dtype=torch.bfloat16, device="cpu",
                             file_path_list=[
                                 "models/FLUX/FLUX.1-dev/text_encoder/model.safetensors",
                                 "models/FLUX/FLUX.1-dev/text_encoder_2",
                                 "models/FLUX/FLUX.1-dev/ae.safetensors",
                                 "models/FLUX/FLUX.1-dev/flux1-dev.safetensors"
                             ])
model_manager.load_lora("models/lightning_logs/version_0/checkpoints/epoch=1-step=14.ckpt", lora_alpha=1.0)
pipe = FluxImagePipeline.from_model_manager(model_manager)

torch.manual_seed(0)
image = pipe(
    prompt="a dog is jumping, flowers around the dog, the background is mountains and clouds",
    num_inference_steps=2, embedded_guidance=3.5, height=32, width=32,
)
image.save("image_with_lora.jpg")
"""


@pytest.fixture(scope="module")
def version_0(workplace) -> Path:
    workplace.python(SCRIPT, *COMMAND)
    return workplace.folder / "models/lightning_logs/version_0"


def test_printed_command_ends_in_the_checkpoints_of_the_page(version_0):
    """Epochs count from 0; an epoch has steps_per_epoch steps although the data set has only five pictures."""
    names = sorted(path.name for path in (version_0 / "checkpoints").iterdir())
    assert names == ["epoch=0-step=7.ckpt", "epoch=1-step=14.ckpt"]


def test_printed_inference_script_loads_the_checkpoint(workplace, version_0):
    workplace.python("-c", INFERENCE)
    assert Image.open(workplace.folder / "image_with_lora.jpg").size == (32, 32)


def test_version_counts_up_and_bare_names_are_written_without_align(workplace, version_0):
    import torch

    words = [word for word in COMMAND if word != "--align_to_opensource_format"]
    words[words.index("--max_epochs") + 1] = "1"
    workplace.python(SCRIPT, *words, "--quantize", "float8_e4m3fn")
    aligned = torch.load(version_0 / "checkpoints" / "epoch=0-step=7.ckpt", weights_only=True)
    bare = torch.load(version_0.parent / "version_1/checkpoints/epoch=0-step=7.ckpt", weights_only=True)
    assert all(key.startswith("transformer.") for key in aligned)
    assert not any(key.startswith("transformer.") for key in bare)


def test_bad_input_is_one_line(workplace):
    finished = workplace.python(SCRIPT, *COMMAND, "--height", "40", code=2)
    assert finished.stderr == "error: height 40 is not divisible by 16; the nearest that is: 32.\n"


def test_help_is_complete(workplace):
    shown = workplace.python(SCRIPT, "-h", COLUMNS="80").stdout
    for option in {word for word in COMMAND if word.startswith("--")} | {
        "--modelscope_model_id", "--modelscope_access_token", "--training_strategy", "--accumulate_grad_batches",
        "--random_flip", "--batch_size", "--dataloader_num_workers", "--lora_target_modules", "--quantize"}:
        assert option in shown
    assert "examples/train/flux/train_flux_lora.py" in shown


OWN_SCRIPT = """
import argparse
import torch
from diffsynth import FluxImagePipeline
from diffsynth.diffusion.loss import FlowMatchSFTLoss
from diffsynth.diffusion.training_module import DiffusionTrainingModule
from diffsynth.trainers.text_to_image import add_general_parsers, launch_training_task


class Module(DiffusionTrainingModule):
    def __init__(self, paths, lora_rank):
        super().__init__()
        self.pipe = FluxImagePipeline.from_pretrained(torch.float32, "cpu", paths)
        self.switch_pipe_to_training_mode(
            self.pipe, lora_base_model="dit", lora_target_modules="to_q", lora_rank=lora_rank)

    def forward(self, data):
        shared = {"input_image": data["image"], "height": 32, "width": 32, "cfg_scale": 1, "max_sequence_length": 16}
        shared, posi, _ = self.pipe.run_units(shared, {"prompt": data["prompt"]}, {"negative_prompt": ""})
        return FlowMatchSFTLoss(self.pipe, **shared, **posi)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--paths", nargs="+")
    args = add_general_parsers(parser).parse_args()
    launch_training_task(Module(args.paths, args.lora_rank), args)
"""


def test_script_of_ones_own_over_the_older_functions(workplace):
    (workplace.folder / "own.py").write_text(OWN_SCRIPT, encoding="utf-8")
    folder = "models/FLUX/FLUX.1-dev"
    workplace.python(
        "own.py", "--paths", f"{folder}/flux1-dev.safetensors", f"{folder}/ae.safetensors", f"{folder}/text_encoder",
        f"{folder}/text_encoder_2", "--dataset_path", "data/dog", "--output_path", "own", "--steps_per_epoch", "3",
        "--height", "32", "--width", "32", "--precision", "32", "--lora_rank", "2", "--accumulate_grad_batches", "2")
    checkpoints = workplace.folder / "own/lightning_logs/version_0/checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["epoch=0-step=3.ckpt"]
