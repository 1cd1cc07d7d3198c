"""Promise 10, of data sets and configurations: nothing runs, fills the memory or leads out of the folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from diffsynth.config import TrainConfig
from diffsynth.core.data import UnifiedDataset
from diffsynth.core.data.image_file import read_header, read_image, read_size
from diffsynth.core.data.metadata import read_metadata
from diffsynth.core.errors import UserError, one_line
from diffsynth.core.picture_file import read_picture_text
from tests import hostile
from tests.contract.refusals import cheap, ends_with_2, refused
from tests.contract.tiny import FamilyAtWork

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, about the damage that is meant


# -- data sets


@pytest.mark.parametrize("name", hostile.pictures())
def test_pictures_made_to_fill_the_memory_are_refused_before_decoding(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(hostile.pictures()[name])
    with refused(str(path), folder=tmp_path):
        read_image(path)
    for read in (read_size, read_header, read_picture_text):
        with cheap():
            try:
                read(path)  # may be told without the pixels
            except UserError as error:
                assert str(path) in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", hostile.metadata_files())
def test_hostile_metadata_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(hostile.metadata_files()[name])
    with refused(str(path), folder=tmp_path):
        read_metadata(None, path)


@pytest.mark.parametrize("suffix", ["csv", "json"])
@pytest.mark.parametrize("name", hostile.FILE_NAMES, ids=lambda name: repr(name[:20]))
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str, suffix: str) -> None:
    data, outside = tmp_path / "data", tmp_path / "outside"
    for folder in (data, outside):
        folder.mkdir()
    for secret in (outside / "secret.png", tmp_path / "secret.png"):
        secret.write_bytes(hostile._saved("PNG"))
    (data / "link.png").symlink_to(outside / "secret.png")
    (data / "linked").symlink_to(outside)
    os.mkfifo(data / "pipe.png")
    name = name.replace("{outside}", str(outside))
    if suffix == "csv":
        (data / "metadata.csv").write_text(f'image,prompt\n"{name}",x\n', encoding="utf-8")
    else:
        (data / "metadata.json").write_text(json.dumps([{"image": name, "prompt": "x"}]), encoding="utf-8")

    def opened() -> UnifiedDataset:
        return UnifiedDataset(
            data, data_file_keys="image",
            main_data_operator=UnifiedDataset.default_image_operator(str(data), height=16, width=16),
        )

    for attempt in (lambda: opened()[0], lambda: opened().check(), lambda: opened().fingerprint(0)):
        with refused(f"metadata.{suffix}", folder=tmp_path):
            attempt()


def test_captions_and_metadata_cannot_be_links_to_other_files_of_the_user(tmp_path: Path) -> None:
    secret, data = tmp_path / "secret.txt", tmp_path / "data"
    secret.write_text("image,prompt\nthe key", encoding="utf-8")
    data.mkdir()
    (data / "a.png").write_bytes(hostile._saved("PNG"))
    (data / "a.txt").symlink_to(secret)
    problems = read_metadata(data, None).problems
    assert "outside the data set folder" in problems[0][1]
    os.mkfifo(data / "pipe")
    for other in (secret.parent / "data" / "pipe", Path("/dev/zero")):
        (data / "a.txt").unlink()
        (data / "a.txt").symlink_to(other)
        assert 0 in read_metadata(data, None).problems
    (data / "metadata.csv").symlink_to(secret)
    with refused("outside the data set folder"):
        read_metadata(data, None)


def test_cells_that_mean_something_elsewhere_are_only_text(tmp_path: Path) -> None:
    cells = [
        "=cmd|' /C calc'!A0", "@SUM(1)", "<script>alert(1)</script>", "{{ 7 * 7 }}", "%s%n", "$(touch x)",
        "\x1b]0;title\x07",
    ]
    path = tmp_path / "metadata.json"
    path.write_text(json.dumps([{"image": "a.png", "prompt": cell} for cell in cells]), encoding="utf-8-sig")
    table = read_metadata(None, path)
    assert [table.row(index)["prompt"] for index in range(len(cells))] == cells


def test_messages_cannot_write_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metadata.csv").write_text("\x1b]0;title\x07\x1b[2J,prompt\nx,y\n", encoding="utf-8")
    ends_with_2(["train", "--dataset_base_path", str(tmp_path), "--model_paths", str(tmp_path)], capsys)
    ends_with_2(["train", "--\x1b[2Jx", "1"], capsys, "\\x1b[2Jx")
    assert len(one_line("x" * 10**6)) < 3000


# -- options


@pytest.mark.parametrize("name", [name for name in hostile.yaml_files(Path("/")) if name not in ("code", "process")])
def test_hostile_configurations_are_refused(tmp_path: Path, name: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "run.yaml"
    path.write_bytes(hostile.yaml_files(marker)[name])
    with refused("run.yaml", folder=tmp_path):
        TrainConfig.from_sources(yaml=path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["code", "process"])
def test_configurations_import_no_code_that_lies_beside_them(
    family: FamilyAtWork, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    marker = tmp_path / "marker"
    (tmp_path / "evil_optimizer.py").write_text(
        f"import torch\nopen({str(marker)!r}, 'w').close()\nclass Evil(torch.optim.SGD): pass\n", encoding="utf-8"
    )
    (tmp_path / "run.yaml").write_bytes(hostile.yaml_files(marker)[name])
    words = ["train", "--config", "run.yaml", *family.words(pictures, tmp_path / "out", max_steps=1)]
    ends_with_2(words, capsys, "optimizer")
    assert not marker.exists()
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize("text", ["[" * 100_000, '["a"' + "]" * 5, "9" * 5000, '"\ud800"', '{"a": ' * 2000])
def test_hostile_json_options_are_refused(text: str) -> None:
    for name in ("model_paths", "optimizer_args"):
        with refused(name):
            TrainConfig(**{name: "[" + text if name == "model_paths" else text})
