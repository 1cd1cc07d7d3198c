"""One training run: what it writes, that it repeats, that batch size changes only its speed."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors import safe_open

from diffsynth.core.errors import UserError
from tests.pictures import make_dataset
from tests.training_run import make_config, make_data, train_tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "pictures", count=4)


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def original_weights(flux_folder):
    from diffsynth import load_component

    return load_component(flux_folder / "flux1-dev.safetensors").state_dict()


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_writes_weights_state_metrics_configuration_and_curve(flux_folder, data, tmp_path):
    train_tiny(flux_folder, data, tmp_path, num_epochs=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml", "epoch-0.safetensors", "epoch-1.safetensors", "loss_curve.png", "metrics.jsonl", "plan.json",
        "state"]
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-8"]
    metrics = rows(tmp_path)
    assert [row["step"] for row in metrics] == list(range(1, 9))
    assert [row["epoch"] for row in metrics] == [0] * 4 + [1] * 4
    assert set(metrics[0]) == {"step", "epoch", "loss", "lr", "grad_norm", "items"}
    with safe_open(tmp_path / "epoch-1.safetensors", framework="pt") as file:
        assert any(key.startswith("transformer.transformer_blocks.0.attn.to_q.lora_A") for key in file.keys())  # noqa: SIM118
        assert "lora_adapter_metadata" in file.metadata()


def test_training_twice_gives_the_same_bytes(flux_folder, data, tmp_path):
    for name in ("first", "second"):
        train_tiny(flux_folder, data, tmp_path / name, save_steps=3, max_steps=3, caption_dropout=0.4)
    assert sha(tmp_path / "first/step-3.safetensors") == sha(tmp_path / "second/step-3.safetensors")
    train_tiny(flux_folder, data, tmp_path / "third", save_steps=3, max_steps=3, caption_dropout=0.4, seed=4)
    assert sha(tmp_path / "first/step-3.safetensors") != sha(tmp_path / "third/step-3.safetensors")


def test_only_the_lora_moves_and_the_loss_falls_on_one_batch(flux_folder, tmp_path):
    data = make_dataset(tmp_path / "pictures", count=1)
    before = original_weights(flux_folder)
    module = train_tiny(
        flux_folder, data, tmp_path / "run", dataset_repeat=60, learning_rate=1e-2, timestep_sampling="uniform",
        lora_rank=16, save_steps=100)
    after = module.pipe.dit.state_dict()
    for name, tensor in before.items():
        # adapted layers keep their own weight one level further down
        now = after[name] if name in after else after[name.replace(".weight", ".base_layer.weight").replace(
            ".bias", ".base_layer.bias")]
        assert torch.equal(tensor, now), name
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert sum(losses[-20:]) < 0.97 * sum(losses[:20])


@pytest.mark.parametrize(("changes", "checks"), [
    (dict(lr_scheduler="linear", lr_warmup_steps=2, num_epochs=2), lambda lr: lr[0] < lr[1] < lr[2] and lr[2] > lr[-1]),
    (dict(lr_scheduler="cosine", num_epochs=2), lambda lr: lr == sorted(lr, reverse=True) and lr[-1] < 0.1 * lr[0]),
    (dict(lr_scheduler="constant", num_epochs=2), lambda lr: set(lr) == {1e-3}),
])
def test_learning_rate_follows_its_schedule(flux_folder, data, tmp_path, changes, checks):
    train_tiny(flux_folder, data, tmp_path, **changes)
    assert checks([row["lr"] for row in rows(tmp_path)])


def test_full_training_saves_a_network_that_loads_again(flux_folder, data, tmp_path):
    from diffsynth import load_component

    module = train_tiny(
        flux_folder, data, tmp_path, lora_base_model=None, lora_target_modules="", lora_rank=32, trainable_models="dit",
        max_steps=2, remove_prefix_in_ckpt="pipe.dit.")
    loaded = load_component(tmp_path / "step-2.safetensors" if (tmp_path / "step-2.safetensors").exists()
                            else tmp_path / "epoch-0.safetensors", torch_dtype=torch.float32)
    for name, tensor in module.pipe.dit.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_gradient_checkpointing_changes_no_gradient(flux_folder, data, tmp_path):
    plain = train_tiny(flux_folder, data, tmp_path / "plain", max_steps=2).trainable_parameters()
    for name, options in {"kept": {}, "offloaded": {"use_gradient_checkpointing_offload": True}}.items():
        module = train_tiny(flux_folder, data, tmp_path / name, max_steps=2, use_gradient_checkpointing=True, **options)
        assert module.pipe.dit.is_gradient_checkpointing
        for key, parameter in module.trainable_parameters().items():
            assert torch.allclose(parameter, plain[key], rtol=0, atol=1e-6), key


def test_output_folder_of_another_run_is_refused(flux_folder, data, tmp_path):
    train_tiny(flux_folder, data, tmp_path, max_steps=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UserError, match="holds another run"):
        train_tiny(flux_folder, data, tmp_path, max_steps=1)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_keep_checkpoints_keeps_the_newest(flux_folder, data, tmp_path):
    train_tiny(flux_folder, data, tmp_path, save_steps=1, keep_checkpoints=2)
    kept = sorted(path.name for path in tmp_path.glob("step-*.safetensors"))
    assert kept == ["step-3.safetensors", "step-4.safetensors"]


def test_data_of_the_tiny_run_has_the_size_asked_for(data, tmp_path):
    item = make_data(data, make_config(tmp_path)).load(0)
    assert item["image"].size == (32, 32)
