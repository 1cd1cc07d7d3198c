"""The newer pages' scripts under ``accelerate launch``, on one and on two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import MODELS, REPOSITORY

SCRIPT = str(REPOSITORY / "examples/flux/model_training/train.py")
FLAGS = [
    "--dataset_base_path", "data/example_image_dataset",
    "--dataset_metadata_path", "data/example_image_dataset/metadata.csv",
    "--max_pixels", "1024", "--dataset_repeat", "2", "--model_paths", MODELS, "--learning_rate", "1e-3",
    "--num_epochs", "1", "--save_steps", "3", "--lora_base_model", "dit", "--lora_target_modules", "to_q,to_k,to_v",
    "--lora_rank", "4", "--remove_prefix_in_ckpt", "pipe.dit.", "--use_gradient_checkpointing",
    "--mixed_precision", "no", "--max_sequence_length", "16", "--device", "cpu",
]


@pytest.fixture(scope="module")
def one_process(workplace) -> Path:
    workplace.accelerate(SCRIPT, *FLAGS, "--gradient_accumulation_steps", "2", "--output_path", "one")
    return workplace.folder / "one"


def test_flags_of_the_newer_page_on_one_process(one_process):
    names = {path.name for path in one_process.iterdir()}
    assert {"step-3.safetensors", "config.yaml", "metrics.jsonl", "state"} <= names


@pytest.mark.parametrize("num_processes", [1, 2])
def test_complete_script_of_the_newest_page(workplace, num_processes):
    """``special/simple/train.py`` with a smaller size and fewer repeats; it takes its paths from nowhere else."""
    text = (REPOSITORY / "examples/flux/model_training/special/simple/train.py").read_text(encoding="utf-8")
    for old, new in {"repeat=50": "repeat=2", "height=512": "height=32", "width=512": "width=32",
                     '"models/toy_model"': f'"models/toy_model_{num_processes}"'}.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (workplace.folder / "simple.py").write_text(text, encoding="utf-8")
    workplace.accelerate("simple.py", num_processes=num_processes, port=29732)
    output = workplace.folder / f"models/toy_model_{num_processes}"
    assert (output / "epoch-0.safetensors").is_file()
    rows = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 10 // num_processes
    assert json.loads(rows[0])["lr"] == 1e-5
