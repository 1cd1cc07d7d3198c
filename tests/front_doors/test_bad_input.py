"""Bad data sets, weights and LoRA files: one line that names the thing and the remedy, exit code 2, nothing written."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffsynth.cli import main
from tests.pictures import make_dataset

Break = Callable[["Setup"], None]


class Setup:
    """A good run in a folder of its own, for a test to spoil one thing of."""

    def __init__(self, folder: Path, flux_folder: Path) -> None:
        self.folder = folder
        self.data = make_dataset(folder / "data", count=3)
        self.models = folder / "models"
        shutil.copytree(flux_folder, self.models)
        self.command = "train"
        self.options = {
            "dataset_base_path": str(self.data), "dataset_metadata_path": str(self.data / "metadata.csv"),
            "model_paths": json.dumps([str(self.models / name) for name in (
                "flux1-dev.safetensors", "ae.safetensors", "text_encoder/model.safetensors", "text_encoder_2")]),
            "lora_base_model": "dit", "lora_rank": "2", "height": "32", "width": "32", "device": "cpu",
            "mixed_precision": "no", "output_path": str(folder / "out"), "cache_path": str(folder / "cache"),
            "max_steps": "1", "max_sequence_length": "8",
        }

    def add_row(self, row: str) -> None:
        with (self.data / "metadata.csv").open("a", encoding="utf-8") as file:
            file.write(row + "\n")

    def words(self) -> list[str]:
        return [self.command, *(word for name, value in self.options.items() for word in (f"--{name}", value))]


class RunsCode:
    """Unpickled, it would make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def truncated_weights(setup: Setup) -> None:
    path = setup.models / "flux1-dev.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def unknown_weights(setup: Setup) -> None:
    save_file({"mystery.weight": torch.zeros(2, 2)}, setup.models / "flux1-dev.safetensors")


def weights_of_another_family(setup: Setup) -> None:
    save_file({
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 768),
    }, setup.models / "flux1-dev.safetensors")


def pickle_that_runs_code(setup: Setup) -> None:
    path = setup.models / "evil.ckpt"
    torch.save({"state_dict": RunsCode(setup.folder / "marker")}, path, pickle_module=pickle)
    setup.options["model_paths"] = json.dumps([str(path)])


def no_tokenizer(setup: Setup) -> None:
    shutil.rmtree(setup.models / "tokenizer_2")


def missing_picture(setup: Setup) -> None:
    setup.add_row("gone.png,a dog")


def corrupt_picture(setup: Setup) -> None:
    (setup.data / "image_1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"not a picture" * 10)


def empty_picture(setup: Setup) -> None:
    (setup.data / "image_1.png").write_bytes(b"")


def huge_picture(setup: Setup) -> None:
    Image.new("1", (20_000, 20_000)).save(setup.data / "image_1.png")


def picture_outside_the_folder(setup: Setup) -> None:
    Image.new("RGB", (64, 64)).save(setup.folder / "secret.png")
    setup.add_row("../secret.png,a secret")


def link_out_of_the_folder(setup: Setup) -> None:
    Image.new("RGB", (64, 64)).save(setup.folder / "secret.png")
    (setup.data / "link.png").symlink_to(setup.folder / "secret.png")
    setup.add_row("link.png,a secret")


def no_caption_column(setup: Setup) -> None:
    path = setup.data / "metadata.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("prompt", "promt"), encoding="utf-8")


def empty_data_set(setup: Setup) -> None:
    (setup.data / "metadata.csv").write_text("image,prompt\n", encoding="utf-8")


def lora_of_another_family(setup: Setup) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{name}.lora_down.weight": torch.zeros(4, 320), f"{name}.lora_up.weight": torch.zeros(320, 4),
               f"{name}.alpha": torch.tensor(4.0)}, setup.folder / "sd15.safetensors")
    setup.options["lora_checkpoint"] = str(setup.folder / "sd15.safetensors")


def lora_that_is_none(setup: Setup) -> None:
    setup.options["lora_checkpoint"] = str(setup.models / "ae.safetensors")


def optimizer_that_does_not_exist(setup: Setup) -> None:
    setup.options["optimizer"] = "AdamX"


def optimizer_argument_that_does_not_exist(setup: Setup) -> None:
    setup.options["optimizer_args"] = '{"beta": 0.9}'


def unknown_model_to_train(setup: Setup) -> None:
    setup.options["lora_base_model"] = "ditt"


def dora_in_a_format_without_it(setup: Setup) -> None:
    setup.options |= {"lora_dora": "True", "lora_format": "kohya"}


def cache_that_is_not_filled(setup: Setup) -> None:
    setup.options["task"] = "sft:train"


CASES: list[tuple[Break, list[str]]] = [
    (truncated_weights, ["flux1-dev.safetensors", "again"]),
    (unknown_weights, ["flux1-dev.safetensors", "mystery"]),
    (weights_of_another_family, ["flux1-dev.safetensors"]),
    (pickle_that_runs_code, ["evil.ckpt"]),
    (no_tokenizer, ["tokenizer_2"]),
    (missing_picture, ["gone.png", "metadata.csv", "row"]),
    (corrupt_picture, ["image_1.png", "row"]),
    (empty_picture, ["image_1.png", "row"]),
    (huge_picture, ["image_1.png", "row"]),
    (picture_outside_the_folder, ["../secret.png", "row"]),
    (link_out_of_the_folder, ["link.png", "row"]),
    (no_caption_column, ["'prompt'", "Did you mean 'promt'"]),
    (empty_data_set, ["metadata.csv"]),
    (lora_of_another_family, ["sd15.safetensors"]),
    (lora_that_is_none, ["ae.safetensors"]),
    (optimizer_that_does_not_exist, ["AdamX", "Did you mean"]),
    (optimizer_argument_that_does_not_exist, ["'beta'", "Did you mean 'betas'"]),
    (unknown_model_to_train, ["'ditt'", "Did you mean 'dit'"]),
    (dora_in_a_format_without_it, ["kohya", "diffusers"]),
    (cache_that_is_not_filled, ["lacks 3 of 3", "sft:data_process"]),
]


@pytest.mark.parametrize(("spoil", "words"), CASES, ids=[spoil.__name__ for spoil, _ in CASES])
def test_bad_input_ends_in_one_line_and_leaves_no_trace(spoil, words, flux_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "True")
    monkeypatch.chdir(tmp_path)
    setup = Setup(tmp_path / "work", flux_folder)
    spoil(setup)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as left:
        main(setup.words())
    err = capsys.readouterr().err
    assert left.value.code == 2, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_same_run_unspoilt_trains(flux_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setup = Setup(tmp_path / "work", flux_folder)
    with pytest.raises(SystemExit) as left:
        main(setup.words())
    assert left.value.code == 0
    assert (tmp_path / "work" / "out" / "step-1.safetensors").exists()


def test_split_tasks_encode_first_and_train_later_without_the_encoders(flux_folder, tmp_path, monkeypatch):
    """``sft:data_process`` writes only the cache; ``sft:train`` then reads it and never loads an encoder."""
    import diffsynth.models.loading as loading

    monkeypatch.chdir(tmp_path)
    setup = Setup(tmp_path / "work", flux_folder)
    loaded: list[str] = []
    real = loading._load

    def recorded(place, name, *rest):
        loaded.append(name)
        return real(place, name, *rest)

    monkeypatch.setattr(loading, "_load", recorded)
    for task, expected in (("sft:data_process", {"text_encoder", "text_encoder_2", "vae"}), ("sft:train", {"dit"})):
        loaded.clear()
        setup.options["task"] = task
        with pytest.raises(SystemExit) as left:
            main(setup.words())
        assert left.value.code == 0
        assert set(loaded) == expected
        assert (tmp_path / "work" / "out" / "step-1.safetensors").exists() == (task == "sft:train")
