"""The older page's options and what they become."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
from pathlib import Path

import pytest

from diffsynth.config import TrainConfig
from diffsynth.core.errors import UserError
from diffsynth.trainers import text_to_image
from diffsynth.trainers.text_to_image import TextToImageOptions, add_general_parsers, next_version_folder

SCRIPT = Path(__file__).parents[3] / "examples/train/flux/train_flux_lora.py"

# the command of the older page, as printed
PAGE_000 = """
  --pretrained_text_encoder_path models/FLUX/FLUX.1-dev/text_encoder/model.safetensors \\
  --pretrained_text_encoder_2_path models/FLUX/FLUX.1-dev/text_encoder_2 \\
  --pretrained_dit_path models/FLUX/FLUX.1-dev/flux1-dev.safetensors \\
  --pretrained_vae_path models/FLUX/FLUX.1-dev/ae.safetensors \\
  --dataset_path data/dog \\
  --output_path ./models \\
  --max_epochs 1 \\
  --steps_per_epoch 100 \\
  --height 1024 \\
  --width 1024 \\
  --center_crop \\
  --precision "bf16" \\
  --learning_rate 1e-4 \\
  --lora_rank 16 \\
  --lora_alpha 16 \\
  --use_gradient_checkpointing \\
  --align_to_opensource_format
"""


@pytest.fixture(scope="module")
def flux_options() -> type[TextToImageOptions]:
    return runpy.run_path(str(SCRIPT))["FluxModelOptions"]


def test_printed_command_becomes_a_newer_configuration(flux_options):
    options = flux_options.from_command_line(shlex.split(PAGE_000.replace("\\\n", " ")))
    config = options.to_config(Path("models/lightning_logs/version_0"))
    assert config == TrainConfig(
        family="flux",
        model_paths=("models/FLUX/FLUX.1-dev/text_encoder/model.safetensors", "models/FLUX/FLUX.1-dev/text_encoder_2",
                     "models/FLUX/FLUX.1-dev/flux1-dev.safetensors", "models/FLUX/FLUX.1-dev/ae.safetensors"),
        dataset_base_path="data/dog", data_file_keys="image", output_path="models/lightning_logs/version_0",
        num_epochs=1, steps_per_epoch=100, height=1024, width=1024, center_crop=True, mixed_precision="bf16",
        learning_rate=1e-4, lora_base_model="dit", lora_rank=16, lora_alpha=16, lora_format="auto",
        use_gradient_checkpointing=True, checkpoint_names="older",
    )


@pytest.mark.parametrize(("line", "name", "value"), [
    ("--lora_target_modules a_to_qkv,b_to_qkv", "lora_target_modules", "a_to_qkv,b_to_qkv"),
    ("--random_flip", "random_flip", True),
    ("--batch_size 2", "batch_size", 2),
    ("--dataloader_num_workers 3", "dataset_num_workers", 3),
    ("--precision 32", "mixed_precision", "no"),
    ("--precision 16", "mixed_precision", "fp16"),
    ("--precision 16-mixed", "mixed_precision", "fp16"),
    ("--precision bf16", "mixed_precision", "bf16"),
    ("--accumulate_grad_batches 4", "gradient_accumulation_steps", 4),
    ("--max_epochs 3", "num_epochs", 3),
    ("--align_to_opensource_format", "lora_format", "auto"),
    ("", "lora_format", "diffsynth"),
    ("", "center_crop", False),
    ("", "lora_rank", 4),
    ("", "lora_alpha", 4.0),
    ("", "mixed_precision", "fp16"),
    ("", "steps_per_epoch", 500),
    ('--quantize "float8_e4m3fn" --pretrained_dit_path a.safetensors', "fp8_models", ("a.safetensors",)),
    ("--pretrained_dit_path a.safetensors,b.safetensors", "model_paths", ("a.safetensors", "b.safetensors")),
])
def test_older_option_becomes(flux_options, line, name, value):
    options = flux_options.from_command_line(["--dataset_path", "data/dog", *shlex.split(line)])
    assert getattr(options.to_config(Path("out")), name) == value


@pytest.mark.parametrize("line", [
    "--training_strategy auto", "--training_strategy deepspeed_stage_1", "--training_strategy deepspeed_stage_2",
    "--training_strategy deepspeed_stage_3", "--modelscope_model_id me/dog --modelscope_access_token x",
])
def test_older_option_is_accepted(line):
    words = line.split()
    options = TextToImageOptions.from_command_line(["--dataset_path", "data/dog", *words])
    assert getattr(options, words[0].removeprefix("--")) == words[1]


def test_every_older_option_has_a_place():
    """No option is read and then forgotten."""
    source = Path(text_to_image.__file__).read_text(encoding="utf-8")
    used = {name for name in TextToImageOptions.model_fields if re.search(rf"(options|self)\.{name}\b", source)}
    mapped = set(text_to_image.RENAMED) | set(text_to_image.CONVERTED)
    assert set(TextToImageOptions.model_fields) == used | mapped


def test_quantize_refuses_other_types():
    with pytest.raises(UserError, match="--quantize: 'int8' is not one of float8_e4m3fn or none"):
        TextToImageOptions.from_command_line(["--dataset_path", "x", "--quantize", "int8"])


def test_version_counts_up_past_gaps(tmp_path):
    assert next_version_folder(tmp_path).name == "version_0"
    for name in ("version_0", "version_4", "version_x"):
        (tmp_path / "lightning_logs" / name).mkdir(parents=True)
    assert next_version_folder(tmp_path) == tmp_path / "lightning_logs" / "version_5"


def test_general_options_can_be_added_to_a_parser_of_ones_own():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrained_path")
    args = add_general_parsers(parser).parse_args(
        ["--dataset_path", "data/dog", "--lora_rank", "8", "--center_crop", "--pretrained_path", "x"])
    own = {name: value for name, value in vars(args).items() if name in TextToImageOptions.model_fields}
    assert TextToImageOptions(**own) == TextToImageOptions(dataset_path="data/dog", lora_rank=8, center_crop=True)


def test_upload_without_a_token_is_refused_before_anything_is_loaded(tmp_path):
    options = TextToImageOptions(dataset_path="nowhere", output_path=str(tmp_path), modelscope_model_id="me/dog")
    with pytest.raises(UserError, match="--modelscope_access_token"):
        text_to_image.run(options)
