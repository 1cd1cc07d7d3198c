"""Command lines: every flag of the pages, errors, help."""

from __future__ import annotations

import re
import shlex

import pytest

from diffsynth.config import DownloadConfig, GenerateConfig, InspectConfig, TrainConfig
from diffsynth.core.command_line import option_name, run_front_door
from diffsynth.core.errors import RunStopped, UserError

# one line for each option of the newer training page, with a value in the form that the page prints
PAGE_001 = {
    "--dataset_base_path data/example_image_dataset": ("dataset_base_path", "data/example_image_dataset"),
    "--dataset_metadata_path data/x/metadata.csv": ("dataset_metadata_path", "data/x/metadata.csv"),
    "--dataset_repeat 50": ("dataset_repeat", 50),
    "--dataset_num_workers 8": ("dataset_num_workers", 8),
    '--data_file_keys "image,video"': ("data_file_keys", ("image", "video")),
    """--model_paths '[ [ "a/1.safetensors", "a/2.safetensors" ], "b.safetensors" ]'""":
        ("model_paths", (("a/1.safetensors", "a/2.safetensors"), "b.safetensors")),
    '--model_id_with_origin_paths "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors,Qwen/Qwen-Image:'
    'vae/diffusion_pytorch_model.safetensors"':
        ("model_id_with_origin_paths", ("Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors",
                                        "Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors")),
    '--extra_inputs "edit_image"': ("extra_inputs", ("edit_image",)),
    """--fp8_models '["b.safetensors"]'""": ("fp8_models", ("b.safetensors",)),
    '--fp8_models "Qwen/Qwen-Image:text_encoder/model*.safetensors"':
        ("fp8_models", ("Qwen/Qwen-Image:text_encoder/model*.safetensors",)),
    "--learning_rate 1e-5": ("learning_rate", 1e-5),
    "--num_epochs 2": ("num_epochs", 2),
    '--trainable_models "text_encoder,controlnet"': ("trainable_models", ("text_encoder", "controlnet")),
    "--find_unused_parameters": ("find_unused_parameters", True),
    "--weight_decay 0.1": ("weight_decay", 0.1),
    "--task sft": ("task", "sft"),
    "--task sft:data_process": ("task", "sft:data_process"),
    "--task sft:train": ("task", "sft:train"),
    '--output_path "./models/train/Qwen-Image_full"': ("output_path", "./models/train/Qwen-Image_full"),
    '--remove_prefix_in_ckpt "pipe.dit."': ("remove_prefix_in_ckpt", "pipe.dit."),
    "--save_steps 100": ("save_steps", 100),
    "--lora_base_model dit": ("lora_base_model", "dit"),
    '--lora_target_modules "to_q,to_k,to_v"': ("lora_target_modules", "to_q,to_k,to_v"),
    "--lora_rank 32": ("lora_rank", 32),
    "--lora_checkpoint a.safetensors": ("lora_checkpoint", "a.safetensors"),
    "--preset_lora_path a.safetensors": ("preset_lora_path", "a.safetensors"),
    "--preset_lora_model dit": ("preset_lora_model", "dit"),
    "--use_gradient_checkpointing": ("use_gradient_checkpointing", True),
    "--use_gradient_checkpointing_offload": ("use_gradient_checkpointing_offload", True),
    "--gradient_accumulation_steps 4": ("gradient_accumulation_steps", 4),
    "--max_pixels 1048576": ("max_pixels", 1048576),
}


@pytest.mark.parametrize(("line", "expected"), PAGE_001.items())
def test_flag_of_the_newer_page(line, expected):
    config = TrainConfig.from_command_line(shlex.split(line))
    name, value = expected
    assert getattr(config, name) == value
    assert config.origins[name] == "command line"


def test_complete_command_of_the_newer_page():
    config = TrainConfig.from_command_line(shlex.split(" ".join(PAGE_001)))
    assert config.num_epochs == 2
    assert config.task == "sft:train"


# what the issue names beyond the pages
ISSUE = """--seed 1 --batch_size 2 --max_steps 3 --resume auto --cache_path c --cache off --lora_alpha 4
--lora_format kohya --optimizer torch.optim.SGD --lr_scheduler cosine --lr_warmup_steps 5 --max_grad_norm 0.5
--timestep_sampling logit_normal --caption_dropout 0.1 --sample_prompts 'a dog|a cat' --sample_every 10
--keep_checkpoints 2 --mixed_precision no --device cpu --height 64 --width 64"""


def test_options_that_the_issue_names():
    config = TrainConfig.from_command_line(shlex.split(ISSUE))
    assert (config.seed, config.batch_size, config.max_steps, config.resume) == (1, 2, 3, "auto")
    assert config.sample_prompts == ("a dog", "a cat")
    assert all(config.origins[word.removeprefix("--")] == "command line"
               for word in shlex.split(ISSUE) if word.startswith("--"))


@pytest.mark.parametrize("line", ["--lora_rank 8", "--lora_rank=8", "--lora-rank 8", "--lora_rank 4 --lora_rank 8"])
def test_spellings_of_a_value(line):
    assert TrainConfig.from_command_line(line.split()).lora_rank == 8


@pytest.mark.parametrize(("line", "value"), [
    ("--center_crop", True), ("--no-center_crop", False), ("--no_center_crop", False), ("--center_crop false", False),
    ("--center_crop=False", False), ("--center_crop true", True), ("", True),
])
def test_spellings_of_a_switch(line, value):
    assert TrainConfig.from_command_line(line.split()).center_crop is value


@pytest.mark.parametrize(("line", "message"), [
    ("--lora_rnak 8", "unknown option --lora_rnak. Did you mean --lora_rank?"),
    ("--quux", "unknown option --quux. --help lists all options."),
    ("--no-lora_rank", "unknown option --no-lora_rank. Did you mean --lora_rank?"),
    ("--lora_rank eight", "--lora_rank: 'eight' is not a whole number, at least 1."),
    ("--lora_rank 8.5", "--lora_rank: '8.5' is not a whole number, at least 1."),
    ("--learning_rate fast", "--learning_rate: 'fast' is not a number, greater than 0."),
    ("--resume", "option --resume needs a value"),
    ("--height --width 3", "option --height needs a value"),
    ("--lora_rank 1 2", "unexpected word '2'"),
    ("train", "unexpected word 'train'"),
    ("--task sft:foo", "--task: 'sft:foo' is not one of sft, sft:data_process, sft:train."),
    ("--config", "option --config needs a value"),
])
def test_bad_command_line_is_one_sentence(line, message, capsys):
    with pytest.raises(UserError) as error:
        TrainConfig.from_command_line(line.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert capsys.readouterr() == ("", "")


def test_config_file_on_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lora_rank: 8\nseed: 5\n", encoding="utf-8")
    config = TrainConfig.from_command_line(["--seed", "6", "--config", str(file)])
    assert (config.lora_rank, config.seed) == (8, 6)
    assert config.origins["lora_rank"] == "run.yaml"


def test_values_may_hold_spaces_equals_signs_and_leading_dashes():
    config = GenerateConfig.from_command_line(["--prompt", "a = b, \"c\"", "--negative_prompt=-blurry --low"])
    assert (config.prompt, config.negative_prompt) == ('a = b, "c"', "-blurry --low")


def test_generate_takes_several_loras():
    config = GenerateConfig.from_command_line(["--lora", "a.safetensors:0.5,b.safetensors", "--seed", "3"])
    assert config.lora == ("a.safetensors:0.5", "b.safetensors")


@pytest.mark.parametrize("line", ["x.safetensors --json", "--json x.safetensors"])
def test_inspect_takes_a_path_and_a_switch_in_any_order(line):
    config = InspectConfig.from_command_line(line.split())
    assert (config.path, config.as_json) == (("x.safetensors",), True)


def test_required_words_are_asked_for():
    with pytest.raises(UserError, match="NAME is required"):
        DownloadConfig.from_command_line([])


@pytest.mark.parametrize("schema", [TrainConfig, GenerateConfig, InspectConfig, DownloadConfig])
def test_help_lists_every_option_with_its_default_in_80_columns(schema, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        schema.from_command_line(["--help"], "diffsynth x", "  diffsynth x --example")
    assert exit_.value.code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert max(map(len, text.splitlines())) <= 80
    flat = re.sub(r"[\s│]+", " ", text)
    for name, field in schema.model_fields.items():
        spelling = option_name(name, field)
        description = f"{field.description} ("
        # lines are broken after commas too
        assert re.sub(r"\s+", "", description) in flat.replace(" ", ""), f"{name} is not described"
        assert f"--{spelling} " in flat or f" {spelling.upper()} " in flat
        shown = re.escape(description.replace(" ", "")) + r"(default:[^)]+|required)\)"
        assert re.search(shown, flat.replace(" ", "")), f"{name} shows no default"
    for title, _, _ in schema.groups():
        assert title in text
    assert text.rstrip().endswith("diffsynth x --example")


@pytest.mark.parametrize(("error", "code", "line"), [
    (UserError("first\nsecond."), 2, "error: first second.\n"),
    (RunStopped("no numbers."), 3, "stopped: no numbers.\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
])
def test_front_door_turns_errors_into_one_line_and_an_exit_code(error, code, line, capsys):
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as exit_:
        run_front_door(command)
    assert exit_.value.code == code
    assert capsys.readouterr() == ("", line)


def test_front_door_keeps_the_traceback_of_our_own_mistakes():
    with pytest.raises(ZeroDivisionError):
        run_front_door(lambda: 1 / 0)
