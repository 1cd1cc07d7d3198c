"""What you preview is what you ship: sample pictures are what ``diffsynth generate`` draws with the saved file."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffsynth.cli import main
from diffsynth.config import GenerateConfig
from diffsynth.core.errors import UserError
from diffsynth.core.picture_file import read_picture_text
from diffsynth.diffusion.picture_recipe import read_recipe
from diffsynth.trainers.generate import generate

from .tiny import FamilyAtWork, process_environment

SAMPLES = dict(sample_prompts="a dog|a red circle", sample_every=2, sample_steps=2)
RUN: dict[str, Any] = dict(max_steps=4, save_steps=3, learning_rate=1e-2)
DRAWN = {f"step-{step:06d}/{index}.png" for step in (0, 2, 4) for index in (0, 1)}


@pytest.fixture(scope="module")
def run(family: FamilyAtWork, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("previews") / "run"
    family.train(pictures, output, **RUN, **SAMPLES)
    return output


def drawn(output: Path) -> set[str]:
    return {path.relative_to(output / "samples").as_posix() for path in (output / "samples").rglob("*.png")}


def weights(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}


def again(picture: Path, output: Path, **options: Any) -> bytes:
    """The file that ``--from`` writes."""
    return generate(GenerateConfig(from_picture=str(picture), output=str(output), **options))[0].read_bytes()


def command(*words: str) -> None:
    finished = subprocess.run([sys.executable, "-m", "diffsynth", *words], env=process_environment(), text=True,
                              capture_output=True, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def model_words(family: FamilyAtWork) -> list[str]:
    return ["--device", "cpu", "--model_paths", json.dumps(family.model_files), "--height", "32", "--width", "32",
            "--num_inference_steps", "2"]


def test_pictures_are_drawn_before_and_during_training(run):
    assert drawn(run) == DRAWN
    # no save was due at step 2: it was written for the picture
    assert set(weights(run)) == {"step-2.safetensors", "step-3.safetensors", "step-4.safetensors"}
    with Image.open(run / "samples.png") as sheet:
        assert sheet.width > 2 * 32
    different = {(run / "samples" / name).read_bytes() for name in DRAWN}
    assert len(different) == len(DRAWN)


def test_a_preview_is_what_generate_draws_with_the_saved_file(family, pictures, tmp_path):
    """Both commands in bf16, where training computes under autocast and generation does not."""
    options = {**RUN, **SAMPLES, "mixed_precision": "bf16"}
    prompts = options.pop("sample_prompts")
    command("train", *family.words(pictures, tmp_path / "run", **options), "--sample_prompts", prompts)
    command("generate", *model_words(family), "--prompt", "a dog", "--seed", "3", "--torch_dtype", "bfloat16", "--lora",
            str(tmp_path / "run/step-4.safetensors"), "--output", str(tmp_path / "drawn.png"))
    assert drawn(tmp_path / "run") == DRAWN
    assert (tmp_path / "drawn.png").read_bytes() == (tmp_path / "run/samples/step-000004/0.png").read_bytes()
    for name in ("step-000000/1.png", "step-000002/0.png"):
        preview = tmp_path / "run/samples" / name
        assert again(preview, tmp_path / "again.png") == preview.read_bytes()


def test_the_first_preview_is_the_base_model(family, run, tmp_path):
    generate(GenerateConfig.from_sources(command_line=[
        *model_words(family), "--prompt", "a red circle", "--seed", "4", "--torch_dtype", "float32", "--output",
        str(tmp_path / "base.png")]))
    assert (tmp_path / "base.png").read_bytes() == (run / "samples/step-000000/1.png").read_bytes()
    assert read_recipe(tmp_path / "base.png").loras == ()


def variants(family: FamilyAtWork) -> Mapping[str, dict[str, Any]]:
    denoiser = type(family.pipeline(deferred=True)).denoiser_models[0]
    encoder = next(unit.models[0] for unit in family.pipeline(deferred=True).units if unit.prompt_inputs)
    no_lora = dict(lora_base_model=None, lora_target_modules="", lora_rank=32, lora_alpha=None)
    return {
        "fully trained": {**no_lora, "trainable_models": denoiser},
        "a text encoder and a LoRA": {"trainable_models": encoder, "learning_rate": 1e-3},
        "fp8": {"fp8_models": f"{denoiser},{encoder}"},
        "guidance": {"sample_cfg_scale": 3.0},
        "not cached": {"cache": "off"},
        "older names": {"checkpoint_names": "older"},
    }


@pytest.mark.parametrize(
    "kind", ["fully trained", "a text encoder and a LoRA", "fp8", "guidance", "not cached", "older names"])
def test_whatever_is_trained_the_preview_comes_from_its_file(family, pictures, tmp_path, kind):
    options = {**RUN, **SAMPLES, "max_steps": 2, "save_steps": 2, **variants(family)[kind]}
    family.train(pictures, tmp_path / "run", **options)
    if kind in ("fully trained", "a text encoder and a LoRA", "fp8"):
        plain = {name: value for name, value in options.items() if not name.startswith("sample_")}
        family.train(pictures, tmp_path / "plain", **plain)
        assert weights(tmp_path / "run") == weights(tmp_path / "plain")
    pictures_drawn = [tmp_path / "run/samples" / f"step-{step:06d}/0.png" for step in (0, 2)]
    assert pictures_drawn[0].read_bytes() != pictures_drawn[1].read_bytes()
    for picture in pictures_drawn:
        assert again(picture, tmp_path / "again.png") == picture.read_bytes()


def test_previews_do_not_disturb_the_training(family, pictures, run, tmp_path):
    family.train(pictures, tmp_path / "plain", **RUN)
    for name, content in weights(tmp_path / "plain").items():
        assert content == (run / name).read_bytes(), name
    states = [output / "state/step-4/optimizer.safetensors" for output in (run, tmp_path / "plain")]
    assert states[0].read_bytes() == states[1].read_bytes()


def test_a_preset_lora_is_in_the_training_and_not_in_the_preview(family, pictures, run, tmp_path):
    preset = dict(preset_lora_path=str(run / "step-4.safetensors"), preset_lora_model=family.tiny.options[
        "lora_base_model"])
    short = {**RUN, "max_steps": 2}
    family.train(pictures, tmp_path / "run", **short, **SAMPLES, **preset)
    family.train(pictures, tmp_path / "plain", **short, **preset)
    assert weights(tmp_path / "run") == weights(tmp_path / "plain")
    assert (tmp_path / "run/samples/step-000000/0.png").read_bytes() == (run / "samples/step-000000/0.png").read_bytes()
    last = tmp_path / "run/samples/step-000002/0.png"
    assert again(last, tmp_path / "again.png") == last.read_bytes()


def test_a_preview_that_fails_ends_nothing_and_the_file_is_there(family, pictures, run, tmp_path, caplog):
    output = tmp_path / "run"
    output.mkdir()
    (output / "samples").write_text("a file where a folder should be", encoding="utf-8")
    with caplog.at_level(logging.ERROR):
        family.train(pictures, output, **RUN, **SAMPLES)
    assert [f"step {step} failed" in caplog.text for step in (0, 2, 4)] == [True] * 3
    assert weights(output) == weights(run)


def test_a_second_run_reads_no_text_encoder_for_its_previews(family, pictures, run, tmp_path):
    import accelerate
    from accelerate.state import AcceleratorState

    from diffsynth.diffusion.logger import ModelLogger
    from diffsynth.diffusion.runner import launch_training_task

    AcceleratorState._reset_state(reset_partial_state=True)
    config = family.config(pictures, tmp_path / "run", **RUN, **SAMPLES, cache_path=str(run.parent / "run-cache"))
    module = family.module(config)
    load, loaded = module.pipe._load_component, []
    module.pipe._load_component = lambda name: loaded.append(name) or load(name)
    launch_training_task(accelerate.Accelerator(cpu=True, mixed_precision="no"), family.dataset(config), module,
                         ModelLogger(tmp_path / "run"), config)
    encoders = {name for unit in module.pipe.units if unit.prompt_inputs for name in unit.models}
    assert loaded
    assert not encoders & set(loaded)
    for name in DRAWN:
        assert Image.open(tmp_path / "run/samples" / name).tobytes() == Image.open(run / "samples" / name).tobytes()


def test_a_picture_is_made_again_byte_for_byte_by_the_command(run, tmp_path):
    preview = run / "samples/step-000004/1.png"
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--from", str(preview), "--output", str(tmp_path / "again.png")])
    assert ended.value.code == 0
    assert (tmp_path / "again.png").read_bytes() == preview.read_bytes()
    # and that picture again from itself
    assert again(tmp_path / "again.png", tmp_path / "third.png") == preview.read_bytes()


def test_one_of_several_pictures_is_made_again_alone(family, run, tmp_path):
    several = generate(GenerateConfig.from_sources(command_line=[
        *model_words(family), "--torch_dtype", "float32", "--num_images", "2", "--output", str(tmp_path / "many.png")]))
    assert several[0].read_bytes() != several[1].read_bytes()
    assert again(several[1], tmp_path / "again.png") == several[1].read_bytes()
    jpeg = tmp_path / "picture.jpg"
    again(several[0], jpeg)
    assert read_recipe(jpeg) == read_recipe(several[0])


def test_options_on_the_command_line_come_before_the_picture(run, tmp_path):
    preview = run / "samples/step-000004/0.png"
    unchanged = preview.read_bytes()
    assert again(preview, tmp_path / "seed.png", seed=99) != unchanged
    assert read_recipe(tmp_path / "seed.png").options.seed == 99
    base = again(preview, tmp_path / "base.png", lora=())
    assert base == (run / "samples/step-000000/0.png").read_bytes()
    again(preview, tmp_path / "wide.png", width=48)
    with Image.open(tmp_path / "wide.png") as picture:
        assert picture.size == (48, 32)


def test_a_changed_or_moved_file_is_refused_by_name(family, run, tmp_path):
    lora, preview = tmp_path / "my.safetensors", tmp_path / "mine.png"
    shutil.copy(run / "step-4.safetensors", lora)
    content = again(run / "samples/step-000004/0.png", preview, lora=(str(lora),))
    shutil.copy(run / "step-2.safetensors", lora)
    with pytest.raises(UserError, match=r"my\.safetensors, whose content is another one now"):
        again(preview, tmp_path / "again.png")
    assert again(preview, tmp_path / "again.png", lora=(str(lora),)) != content
    lora.unlink()
    with pytest.raises(UserError, match=r"my\.safetensors, which is not there any more"):
        again(preview, tmp_path / "again.png")


def test_a_changed_model_is_refused_by_name(family, run, tmp_path):
    component = next(model for model in read_recipe(run / "samples/step-000004/0.png").models if len(model.paths) == 1)
    path = Path(component.paths[0])
    before, content = path.stat(), path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{path.name}, whose content is another one now"):
            again(run / "samples/step-000004/0.png", tmp_path / "again.png")
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_recipe_says_everything(family, run):
    recipe = json.loads(read_picture_text(run / "samples/step-000004/1.png"))
    assert recipe["family"] == family.name
    assert recipe["torch_dtype"] == "float32"
    assert recipe["device"] == "cpu"
    assert {name: recipe["picture"][name] for name in ("prompt", "seed", "height", "width", "num_inference_steps")} == {
        "prompt": "a red circle", "seed": 4, "height": 32, "width": 32, "num_inference_steps": 2}
    assert [(Path(lora["path"]), lora["strength"]) for lora in recipe["loras"]] == [(run / "step-4.safetensors", 1.0)]
    assert {model["component"] for model in recipe["models"]} == {c.name for c in family.family.components}
