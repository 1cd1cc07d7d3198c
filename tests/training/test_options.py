"""Options of a run, each seen to change what it says it changes."""

from __future__ import annotations

import json

import pytest
import torch

from diffsynth.adapters.lora import load_lora_file
from diffsynth.core.errors import UserError
from diffsynth.models.registry import get_family
from tests.pictures import make_dataset
from tests.training_run import make_config, train_tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "pictures", count=3, sizes=[(64, 48), (48, 64)])


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_noise_levels_and_weights_follow_their_options(flux_folder, data, tmp_path):
    variants = {
        "shifted": {}, "uniform": dict(timestep_sampling="uniform"),
        "logit_normal": dict(timestep_sampling="logit_normal"),
        "more noise": dict(timestep_shift=8.0), "bell": dict(timestep_weighting="bell"),
    }
    traces = {}
    for name, options in variants.items():
        train_tiny(flux_folder, data, tmp_path / name, cache_path=str(tmp_path / "cache"), **options)
        traces[name] = tuple(losses(tmp_path / name))
    assert len(set(traces.values())) == len(variants)


def test_lora_weights_have_the_asked_dtype(flux_folder, data, tmp_path):
    for name in ("float32", "bfloat16"):
        module = train_tiny(flux_folder, data, tmp_path / name, max_steps=1, lora_dtype=name)
        assert {parameter.dtype for parameter in module.trainable_parameters().values()} == {getattr(torch, name)}


def test_rslora_scales_by_the_root_of_the_rank(flux_folder, data, tmp_path):
    for lora_rslora, scale in ((False, 8 / 4), (True, 8 / 2)):
        out = tmp_path / str(lora_rslora)
        train_tiny(flux_folder, data, out, max_steps=1, lora_alpha=8.0, lora_rank=4, lora_rslora=lora_rslora)
        layers = load_lora_file(out / "step-1.safetensors", get_family("flux"))["dit"].layers
        assert {layer.scale for layer in layers.values()} == {scale}


def test_preset_lora_is_merged_before_training(flux_folder, data, tmp_path):
    train_tiny(flux_folder, data, tmp_path / "preset", max_steps=2, learning_rate=0.1)
    path = tmp_path / "preset" / "step-2.safetensors"
    changes = load_lora_file(path, get_family("flux"))["dit"].layers
    plain = train_tiny(flux_folder, data, tmp_path / "plain", max_steps=1).pipe.dit
    merged = train_tiny(
        flux_folder, data, tmp_path / "merged", max_steps=1, preset_lora_path=str(path), preset_lora_model="dit",
    ).pipe.dit
    for name, layer in changes.items():
        difference = merged.get_submodule(name).base_layer.weight - plain.get_submodule(name).base_layer.weight
        assert difference.abs().max() > 0
        assert torch.allclose(difference, layer.delta(), atol=1e-5)


def test_preset_lora_of_an_encoder_is_part_of_the_cache(flux_folder, data, tmp_path):
    """With a LoRA on the text encoder its outputs are others; entries made without it must not be used."""
    from safetensors.torch import save_file

    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    path = tmp_path / "clip.safetensors"
    torch.manual_seed(0)
    save_file({f"{name}.lora_A.weight": torch.randn(2, 64), f"{name}.lora_B.weight": torch.randn(64, 2)}, path)
    preset = dict(preset_lora_path=str(path), preset_lora_model="text_encoder")
    for run, options in {"without": {}, "with": preset}.items():
        train_tiny(flux_folder, data, tmp_path / run, cache_path=str(tmp_path / "cache"), **options)
    assert losses(tmp_path / "with") != losses(tmp_path / "without")


def test_loading_in_workers_changes_nothing(flux_folder, data, tmp_path):
    for workers in (0, 2):
        train_tiny(
            flux_folder, data, tmp_path / str(workers), cache="off", random_flip=True, dataset_num_workers=workers)
    assert losses(tmp_path / "0") == losses(tmp_path / "2")


def test_pictures_of_several_sizes_train_in_batches(flux_folder, data, tmp_path):
    """Dynamic resolution: only equal sizes share a forward pass, and still no item is left out."""
    train_tiny(flux_folder, data, tmp_path, height=None, width=None, max_pixels=4096, batch_size=2, num_epochs=2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["items"] for row in rows if row["epoch"] == 0].count(2) == 1
    assert sum(row["items"] for row in rows) == 6


def test_guidance_of_the_samples_changes_the_pictures(flux_folder, data, tmp_path):
    for scale in (1.0, 4.0):
        train_tiny(flux_folder, data, tmp_path / str(scale), max_steps=1, sample_prompts="a dog", sample_steps=2,
                   sample_cfg_scale=scale)
    first, second = ((tmp_path / name / "samples/step-000001/0.png").read_bytes() for name in ("1.0", "4.0"))
    assert first != second


def test_launcher_is_told_of_unused_parameters(tmp_path):
    from accelerate.state import AcceleratorState

    from diffsynth.trainers.run import build_accelerator

    for wanted in (True, False):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = build_accelerator(make_config(tmp_path, find_unused_parameters=wanted))
        assert accelerator.ddp_handler.find_unused_parameters is wanted
    AcceleratorState._reset_state(reset_partial_state=True)


def test_tensorboard_gets_the_metrics(flux_folder, data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from diffsynth.diffusion.logger import ModelLogger

    files = ModelLogger(tmp_path / "run", tensorboard=True)
    files.start(make_config(tmp_path / "run"), 0)
    files.log(dict(step=1, epoch=0, loss=0.5, lr=1e-3, grad_norm=2.0, items=1))
    files.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == [0.5]


def test_older_checkpoints_continue_to_count_after_a_resume(flux_folder, data, tmp_path):
    options = dict(save_steps=1, keep_checkpoints=2, num_epochs=2)
    train_tiny(flux_folder, data, tmp_path, max_steps=3, **options)
    train_tiny(flux_folder, data, tmp_path, max_steps=5, resume="auto", **options)
    kept = sorted(path.name for path in tmp_path.glob("step-*.safetensors"))
    assert kept == ["step-4.safetensors", "step-5.safetensors"]


def test_epochs_of_fixed_length_go_round_the_data(flux_folder, data, tmp_path):
    train_tiny(flux_folder, data, tmp_path, steps_per_epoch=4, num_epochs=2)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["epoch"] for row in rows] == [0] * 4 + [1] * 4
    assert len({row["loss"] for row in rows}) == 8


def test_trained_text_encoder_reads_the_captions_in_every_step(flux_folder, data, tmp_path, monkeypatch):
    from diffsynth.pipelines.flux import EncodePrompt

    seen: list[str] = []
    real = EncodePrompt.process

    def recorded(self, pipe, prompt, max_sequence_length):
        seen.extend(prompt)
        return real(self, pipe, prompt, max_sequence_length)

    monkeypatch.setattr(EncodePrompt, "process", recorded)
    module = train_tiny(flux_folder, data, tmp_path, lora_base_model="text_encoder", lora_target_modules="q_proj",
                        num_epochs=2, batch_size=2)
    assert len(seen) == 6
    assert len(set(seen)) == 3
    assert all("picture" in prompt for prompt in seen)
    trained = module.trainable_parameters()
    assert any(parameter.abs().max() > 0 for name, parameter in trained.items() if "lora_B" in name)


def test_autoencoder_can_be_trained(flux_folder, data, tmp_path):
    module = train_tiny(flux_folder, data, tmp_path, lora_base_model=None, lora_target_modules="", lora_rank=32,
                        trainable_models="vae", max_steps=1)
    assert module.trainable_models() == ["vae"]
    assert (tmp_path / "step-1.safetensors").exists()


def test_full_model_and_lora_are_kept_together(flux_folder, data, tmp_path):
    train_tiny(flux_folder, data, tmp_path, trainable_models="text_encoder", save_steps=1, keep_checkpoints=1)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-3-lora.safetensors", "step-3.safetensors"]


@pytest.mark.parametrize(("options", "message"), [
    (dict(trainable_models="dit"), "both in trainable_models and the lora_base_model"),
    (dict(lora_dora=True, fp8_models=("dit",)), "lora_dora needs"),
    (dict(optimizer="LBFGS"), "several times in one step"),
    (dict(task="sft:train", cache="off"), "leave --cache at auto"),
])
def test_contradicting_options_are_refused(flux_folder, data, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train_tiny(flux_folder, data, tmp_path, **options)


def test_sizes_share_steps_in_the_same_way_whatever_the_batch_size(flux_folder, tmp_path):
    data = make_dataset(tmp_path / "pictures", count=8, sizes=[(64, 48), (48, 64), (32, 32)])
    seen = []
    for batch_size, accumulation in ((1, 2), (2, 1)):
        out = tmp_path / f"batch{batch_size}"
        module = train_tiny(
            flux_folder, data, out, height=None, width=None, max_pixels=4096, batch_size=batch_size, max_steps=4,
            gradient_accumulation_steps=accumulation, optimizer="SGD", learning_rate=1.0, weight_decay=0.0,
            max_grad_norm=0.0)
        seen.append(module.trainable_parameters())
    for name, parameter in seen[0].items():
        assert torch.allclose(parameter, seen[1][name], rtol=0, atol=1e-6), name


def test_bad_picture_in_a_worker_is_one_sentence(flux_folder, tmp_path):
    data = make_dataset(tmp_path / "pictures", count=2)
    path = data / "image_1.png"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"image_1\.png") as error:
        train_tiny(flux_folder, data, tmp_path / "out", cache="off", dataset_num_workers=1)
    assert "Traceback" not in str(error.value)


def test_float8_text_encoder_trains(flux_folder, data, tmp_path):
    module = train_tiny(flux_folder, data, tmp_path, max_steps=1, fp8_models=("text_encoder_2", "dit"))
    weights = {parameter.dtype for name, parameter in module.pipe.dit.named_parameters() if "proj_mlp.base" in name}
    assert len(losses(tmp_path)) == 1
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in module.pipe.dit.parameters()} | weights


def test_option_that_a_module_of_ones_own_would_ignore_is_refused(tmp_path):
    import accelerate

    from diffsynth.diffusion.logger import ModelLogger
    from diffsynth.diffusion.runner import launch_training_task
    from diffsynth.diffusion.training_module import DiffusionTrainingModule

    with pytest.raises(UserError, match="timestep_sampling has no effect on DiffusionTrainingModule"):
        launch_training_task(
            accelerate.Accelerator(cpu=True), [], DiffusionTrainingModule(), ModelLogger(tmp_path / "out"),
            timestep_sampling="uniform")
