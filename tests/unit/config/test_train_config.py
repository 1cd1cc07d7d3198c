"""The schema: values, errors, YAML, origins."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffsynth.config import DownloadConfig, GenerateConfig, InspectConfig, TrainConfig
from diffsynth.core.errors import UserError
from diffsynth.core.options import Options
from diffsynth.trainers.text_to_image import TextToImageOptions

SCHEMAS: list[type[Options]] = [TrainConfig, GenerateConfig, InspectConfig, DownloadConfig, TextToImageOptions]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_option_has_a_description_that_is_one_sentence(schema):
    for name, field in schema.model_fields.items():
        assert field.description, f"{schema.__name__}.{name} has no description"
        assert len(field.description) <= 140, f"{schema.__name__}.{name}: say it in one line"
        assert "\n" not in field.description


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_option_stands_in_exactly_one_help_group(schema):
    grouped = [name for _, _, names in schema.groups() for name in names]
    assert sorted(grouped) == sorted(schema.model_fields)


def test_unknown_option_is_refused_with_a_suggestion():
    with pytest.raises(UserError, match=r"unknown option 'lora_rnak'\. Did you mean 'lora_rank'\?"):
        TrainConfig(lora_rnak=8)


@pytest.mark.parametrize(("values", "message"), [
    ({"lora_rank": "x"}, "lora_rank: 'x' is not a whole number, at least 1"),
    ({"lora_rank": 0}, "lora_rank: 0 is not a whole number, at least 1"),
    ({"learning_rate": -1}, "learning_rate: -1 is not a number, greater than 0"),
    ({"caption_dropout": 1.5}, "caption_dropout: 1.5 is not a number, at least 0, at most 1"),
    ({"lora_format": "civitai"}, "lora_format: 'civitai' is not one of auto, diffsynth, diffusers, kohya, comfyui"),
    ({"use_gradient_checkpointing": "perhaps"}, "use_gradient_checkpointing: 'perhaps' is not true or false"),
    ({"data_file_keys": 3}, "data_file_keys: 3 is not names separated by commas"),
    ({"height": 512}, "--height is given without --width"),
    ({"model_paths": '["a",]'}, "model_paths: not valid JSON at character 5"),
    ({"model_paths": [1]}, "model_paths: 1 is not valid JSON of the expected form"),
    ({"optimizer_args": "[1]"}, "optimizer_args: "),
    ({"model_id_with_origin_paths": "FLUX.1-dev"}, "MODEL_ID:FILE_PATTERN"),
])
def test_wrong_value_names_option_value_and_remedy(values, message):
    with pytest.raises(UserError) as error:
        TrainConfig(**values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_text_and_python_values_mean_the_same():
    text = TrainConfig(
        data_file_keys="image, edit_image", trainable_models="dit", sample_prompts="a dog|a red, round ball",
        lora_target_modules="to_q,to_k", model_paths='[["a", "b"], "c"]', optimizer_args='{"eps": 1e-6}',
        learning_rate="1e-5", use_gradient_checkpointing="true", fp8_models="x/y:z*,dit",
    )
    python = TrainConfig(
        data_file_keys=["image", "edit_image"], trainable_models=("dit",),
        sample_prompts=["a dog", "a red, round ball"],
        lora_target_modules=["to_q", "to_k"], model_paths=[["a", "b"], "c"], optimizer_args={"eps": 1e-6},
        learning_rate=1e-5, use_gradient_checkpointing=True, fp8_models=["x/y:z*", "dit"],
    )
    assert text == python
    assert text.model_paths == (("a", "b"), "c")


def test_options_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().lora_rank = 3


YAML = """\
lora_rank: 8
learning_rate: 1e-5
mixed_precision: no
cache: off
height: 64
width: 64
use_gradient_checkpointing: yes
data_file_keys: [image, edit_image]
sample_prompts: [a dog, "a red, round ball"]
model_paths: [[a, b], c]
"""
WORDS = "--lora_rank 8 --learning_rate 1e-5 --mixed_precision no --cache off --height 64 --width=64"
SWITCHES = ["--use_gradient_checkpointing", "--data_file_keys", "image,edit_image"]


def test_yaml_command_line_and_python_give_equal_options(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(YAML, encoding="utf-8")
    from_yaml = TrainConfig.from_sources(file)
    words = [*WORDS.split(), *SWITCHES, "--sample_prompts", "a dog|a red, round ball"]
    words += ["--model_paths", '[["a", "b"], "c"]']
    from_words = TrainConfig.from_sources(None, words)
    from_python = TrainConfig(
        lora_rank=8, learning_rate=1e-5, mixed_precision="no", cache="off", height=64, width=64,
        use_gradient_checkpointing=True, data_file_keys="image,edit_image",
        sample_prompts=["a dog", "a red, round ball"], model_paths=[["a", "b"], "c"],
    )
    assert from_yaml == from_words == from_python


def test_command_line_wins_over_yaml_and_origins_are_kept(tmp_path):
    file = tmp_path / "dog.yaml"
    file.write_text("lora_rank: 8\nheight: 64\nwidth: 64\nseed: 3\n", encoding="utf-8")
    config = TrainConfig.from_sources(file, ["--lora_rank", "4", "--height", "none", "--width", "none"])
    assert (config.lora_rank, config.height, config.seed) == (4, None, 3)
    assert config.origins["lora_rank"] == "command line"
    assert config.origins["seed"] == "dog.yaml"
    assert config.origins["lora_alpha"] == "default"
    assert list(config.origins) == [name for _, _, names in TrainConfig.groups() for name in names]


def test_resolved_configuration_reloads_equal_and_says_where_values_came_from(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\nmixed_precision: no\n", encoding="utf-8")
    prompts = ["a dog: \"fluffy\", 'old'", "dessin d'un chat été # 1", "two\nlines", "小狗", "yes", "1e-3"]
    config = TrainConfig.from_sources(file, ["--lora_rank", "4", "--optimizer_args", '{"eps": 1e-08}']).replace(
        sample_prompts=prompts, model_paths=[["a b", "c"], "d"])
    saved = tmp_path / "config.yaml"
    saved.write_text(config.resolved_yaml(), encoding="utf-8")
    assert TrainConfig.from_sources(saved) == config
    text = saved.read_text(encoding="utf-8")
    assert text.index("from: command line") < text.index("lora_rank: 4") < text.index("from: run.yaml") < text.index(
        "seed: 3") < text.index("from: default") < text.index("num_epochs: 1")


def test_replace_checks_values_and_keeps_origins():
    config = TrainConfig.from_sources(None, ["--lora_rank", "4", "--seed", "1"])
    changed = config.replace(seed=2, lora_rank=4)
    assert (changed.seed, changed.origins["seed"]) == (2, "python")
    assert changed.origins["lora_rank"] == "command line"
    with pytest.raises(UserError, match="lora_rank"):
        config.replace(lora_rank=0)


@pytest.mark.parametrize(("text", "message"), [
    ("seed: 1\nlora_rnak: 8\n", r"run.yaml, line 2: unknown key 'lora_rnak'\. Did you mean 'lora_rank'\?"),
    ("lora_rank: many\n", r"run.yaml, line 1: lora_rank: 'many' is not a whole number"),
    ("- lora_rank\n", "expected one 'name: value' per line"),
    ("lora_rank: [1\n", "line 2: not plain YAML"),
    ("seed: !!python/object/apply:os.system ['touch {marker}']\n", "line 1: not plain YAML"),
    ("seed: !!int 3\n", "line 1: not plain YAML .the tag"),
    ("seed: &seed 3\nlora_rank: *seed\n", "line 1: not plain YAML .anchors"),
    ("seed: 3\nlora_rank: *seed\n", "line 2: not plain YAML .anchors"),
    ("seed: 3\nlora_rank: 4\nseed: 5\n", "line 3: 'seed' stands there twice"),
    ("optimizer_args: {eps: 1, eps: 2}\n", "line 1: 'eps' stands there twice"),
    ("seed: 3\n---\nseed: 4\n", "another document"),
    ("optimizer_args: " + "[" * 5000, "lists inside each other"),
    ("seed: " + "9" * 5000, "a number of 5000 digits"),
    ("learning_rate: .nan\n", "line 1: learning_rate: '.nan' is not a number"),
    ("lora_rank: true\n", "line 1: lora_rank: 'true' is not a whole number"),
])
def test_bad_yaml_is_named_with_file_and_key_and_runs_nothing(tmp_path, text, message):
    file, marker = tmp_path / "run.yaml", tmp_path / "marker"
    file.write_text(text.replace("{marker}", str(marker)), encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        TrainConfig.from_sources(file)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_plain_values_are_those_of_yaml_1_2(tmp_path):
    """``no`` and ``1:30`` are texts, ``1e-6`` is a number, also inside a mapping that no schema checks."""
    file = tmp_path / "run.yaml"
    file.write_text("\ufeffmixed_precision: no\noptimizer_args: {eps: 1e-6, foreach: yes}\n"
                    "sample_prompts: [1:30, '07']\n",
                    encoding="utf-8")
    config = TrainConfig.from_sources(file)
    assert (config.mixed_precision, config.sample_prompts) == ("no", ("1:30", "07"))
    assert config.optimizer_args == {"eps": 1e-6, "foreach": "yes"}


def test_name_of_a_file_cannot_put_lines_into_the_saved_configuration(tmp_path):
    file = tmp_path / "a\nseed: 7\n.yaml"
    file.write_text("lora_rank: 4\n", encoding="utf-8")
    saved = tmp_path / "saved.yaml"
    saved.write_text(TrainConfig.from_sources(file).resolved_yaml(), encoding="utf-8")
    assert TrainConfig.from_sources(saved).seed == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True])
def test_learning_rate_is_a_finite_number(value):
    with pytest.raises(UserError, match="is not a number"):
        TrainConfig(learning_rate=value)


def test_missing_yaml_is_named():
    with pytest.raises(UserError, match=r"cannot read the configuration file nowhere\.yaml: No such file"):
        TrainConfig.from_sources(Path("nowhere.yaml"))
