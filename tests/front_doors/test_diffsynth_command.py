"""``diffsynth train``, ``generate``, ``inspect``: real processes on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diffsynth.cli import main
from diffsynth.config import TrainConfig
from diffsynth.core.errors import UserError
from diffsynth.trainers.generate import parse_lora

from .conftest import MODELS

RUN = f"""\
dataset_base_path: data/example_image_dataset
model_paths: '{MODELS}'
lora_base_model: dit
lora_target_modules: to_q,to_k,to_v
lora_rank: 4
lora_alpha: 2
height: 32
width: 32
mixed_precision: no
max_sequence_length: 16
learning_rate: 1e-3
max_steps: 3
"""


@pytest.fixture(scope="module")
def trained(workplace) -> Path:
    (workplace.folder / "run.yaml").write_text(RUN, encoding="utf-8")
    workplace.diffsynth("train", "--config", "run.yaml", "--output_path", "out", "--seed", "5")
    return workplace.folder / "out"


def test_train_writes_the_files_of_the_newer_page(trained):
    assert (trained / "epoch-0.safetensors").is_file() or (trained / "step-3.safetensors").is_file()
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"step", "epoch", "loss", "lr", "grad_norm", "items"} <= set(rows[0])


def test_saved_configuration_says_where_each_value_came_from(trained):
    text = (trained / "config.yaml").read_text(encoding="utf-8")
    given, from_file, default = text.split("# from: ")[1:]
    assert "seed: 5" in given
    assert "lora_rank: 4" in from_file
    assert "num_epochs: 1" in default


def test_saved_configuration_alone_repeats_the_run(workplace, trained):
    workplace.diffsynth("train", "--config", "out/config.yaml", "--output_path", "again")
    files = sorted(path.name for path in trained.glob("*.safetensors"))
    assert files == sorted(path.name for path in (workplace.folder / "again").glob("*.safetensors"))
    for name in files:
        assert (trained / name).read_bytes() == (workplace.folder / "again" / name).read_bytes()
    first = TrainConfig.from_sources(trained / "config.yaml")
    assert TrainConfig.from_sources(workplace.folder / "again/config.yaml") == first.replace(output_path="again")


def test_generate_draws_with_and_without_the_lora(workplace, trained):
    lora = next(iter(sorted(trained.glob("*.safetensors"))))
    drawn = {}
    for name, more in {"base": [], "lora": ["--lora", f"{lora}:8"], "again": []}.items():
        workplace.diffsynth(
            "generate", "--prompt", "a dog", "--height", "32", "--width", "48", "--num_inference_steps", "2", "--seed",
            "1", "--torch_dtype", "float32", "--model_paths", MODELS, "--output", f"pictures/{name}.png", *more)
        drawn[name] = Image.open(workplace.folder / "pictures" / f"{name}.png")
    assert drawn["base"].size == (48, 32)
    assert drawn["base"].tobytes() == drawn["again"].tobytes()
    assert drawn["base"].tobytes() != drawn["lora"].tobytes()


def test_inspect_names_the_network_in_a_file(workplace):
    found = json.loads(workplace.diffsynth("inspect", "models/FLUX/FLUX.1-dev/flux1-dev.safetensors", "--json").stdout)
    component = found["components"][0]
    assert (component["name"], component["family"], component["class"]) == ("dit", "flux", "FluxTransformer2DModel")
    assert component["num_parameters"] > 0
    assert component["missing"] == component["unexpected"] == []


def test_inspect_describes_a_lora(workplace, trained):
    lora = next(iter(sorted(trained.glob("*.safetensors"))))
    found = json.loads(workplace.diffsynth("inspect", str(lora), "--json").stdout)["lora"]
    assert (found["family"], found["format"], found["rank"], found["alpha"]) == ("flux", "diffusers", 4, 2.0)
    assert found["num_layers"] == len(found["components"]["dit"])


def test_inspect_describes_a_data_set_and_its_problems(tmp_path, capsys):
    train = tmp_path / "train"
    train.mkdir()
    for index, width in enumerate((40, 40, 64)):
        Image.new("RGB", (width, 48)).save(train / f"{index}.png")
    (train / "bad.png").write_bytes(b"")
    (train / "metadata.csv").write_text(
        "file_name,text\n0.png,a dog\n1.png,a dog\n2.png,\ngone.png,x\nbad.png,y\n", encoding="utf-8")
    assert run_main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["dataset"]
    assert (found["rows"], found["columns"]) == (5, ["image", "prompt"])
    assert found["sizes"] == {"40x48": 2, "64x48": 1}
    assert (found["captions"]["distinct"], found["captions"]["empty"]) == (4, 1)
    assert ["gone.png" in found["problems"][0], "bad.png" in found["problems"][1]] == [True, True]
    assert run_main(["inspect", str(tmp_path)]) == 0
    assert "40x48: 2" in capsys.readouterr().out


def run_main(words: list[str]) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(words)
    return exit_.value.code


BAD = [
    ("train --lora_rnak 8", "unknown option --lora_rnak. Did you mean --lora_rank?"),
    ("train --lora_rank x", "--lora_rank: 'x' is not a whole number, at least 1."),
    ("train --config nowhere.yaml", "nowhere.yaml"),
    ("trainn", "Did you mean 'train'?"),
    ("train", "set --dataset_base_path"),
    ("train --config run.yaml --output_path out", "holds another run"),
    ("train --config run.yaml --device cuda:7", "'cuda:7'"),
    ("train --config run.yaml --device quantum", "'quantum'"),
    ("train --config run.yaml --height 40", "height 40 is not divisible by 16; the nearest that is: 32."),
    ("train --config run.yaml --mixed_precision fp16 --device cpu", "--mixed_precision fp16 needs a GPU"),
    ("train --config run.yaml --lora_base_model none", "nothing would be trained"),
    ("train --config run.yaml --sample_steps 3", "--sample_steps has no effect without --sample_prompts"),
    ("train --config run.yaml --lora_target_modules to_qq", "Did you mean 'to_q'?"),
    ("train --config run.yaml --lora_checkpoint gone.safetensors", "there is no file gone.safetensors"),
    ("train --config run.yaml --dataset_base_path nowhere", "nowhere does not exist"),
    ("train --config run.yaml --data_file_keys imag", "no column 'imag'"),
    ("train --config run.yaml --extra_inputs depth", "no column 'depth'"),
    ("train --config run.yaml --model_paths gone.safetensors", "gone.safetensors"),
    ("train --config run.yaml --model_paths models/FLUX/FLUX.1-dev/flux1-dev.safetensors", "ae.safetensors"),
    ("train --config run.yaml --family fluks", "no model family 'fluks'"),
    ("train --config run.yaml --tokenizer_path data", "there is no folder data/tokenizer"),
    ("train --config run.yaml --fp8_models data/dog/train/00.jpg", "00.jpg"),
    ("train --config run.yaml --resume nowhere", "'nowhere'"),
    ("generate --prompt x", "no model is given"),
    ("generate --output picture", "is no picture format"),
    ("generate --lora gone.safetensors:0.5 --model_paths x", "there is no file gone.safetensors"),
    ("generate --denoising_strength 0.5 --model_paths x", "no effect without --input_image"),
    ("inspect nowhere", "there is no file or folder nowhere"),
    ("inspect data/dog/train/00.jpg", "00.jpg"),
    ("download FLUX.1-dve", "Did you mean 'FLUX.1-dev'?"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(workplace, trained, line, message, capsys, monkeypatch):
    monkeypatch.chdir(workplace.folder)
    words = line.split()
    if words[:2] == ["train", "--config"] and "--output_path" not in words:
        words += ["--output_path", "never"]
    before = sorted(workplace.folder.rglob("*"))
    assert run_main(words) == 2
    out, err = capsys.readouterr()
    assert message in err
    lines = [text for text in err.splitlines() if text.startswith("error: ")]
    assert len(lines) == 1
    assert err.endswith("\n")
    assert out == ""
    assert sorted(workplace.folder.rglob("*")) == before


def test_bad_input_of_a_real_process_is_exactly_one_line(workplace, trained):
    finished = workplace.diffsynth("train", "--config", "run.yaml", "--output_path", "out", code=2)
    assert finished.stderr.count("\n") == 1
    assert finished.stdout == ""


def test_overview_lists_the_commands(capsys):
    assert run_main(["--help"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")] == [
        "train", "generate", "replay", "inspect", "check", "download", "cache", "convert", "lora"]


@pytest.mark.parametrize(("entry", "strength"), [("a.safetensors", 1.0), ("a.safetensors:0.5", 0.5), ("b:2", 1.0)])
def test_lora_entry_is_a_path_and_perhaps_a_strength(tmp_path, monkeypatch, entry, strength):
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "b:2"):
        Path(name).touch()
    assert parse_lora(entry) == (Path(entry.removesuffix(":0.5")), strength)


def test_lora_entry_without_a_file_is_refused():
    with pytest.raises(UserError, match="there is no file"):
        parse_lora("nowhere:half")
