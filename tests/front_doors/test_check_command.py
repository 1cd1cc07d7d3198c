"""``diffsynth check``: exit codes, tables, JSON, contact sheet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffsynth.cli import main
from tests.pictures import make_dataset


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["check", *words])
    return int(left.value.code or 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data", count=4, sizes=[(320, 300), (300, 320)])


def test_a_sound_data_set_ends_in_zero(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(folder)) == 0
    shown = capsys.readouterr()
    assert "Training would take all 4 rows" in shown.out
    assert "320x288" in shown.out
    assert "an estimate of 1.33 tokens a word" in shown.out
    assert "error" not in shown.err


def test_what_training_refuses_ends_in_two_with_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "image_1.png").unlink()
    (folder / "image_3.png").write_bytes(b"")
    assert run(str(folder / "metadata.csv")) == 2
    shown = capsys.readouterr()
    assert "unusable row" in shown.out
    assert "row 2:" in shown.out
    assert "row 4:" in shown.out
    assert shown.err.splitlines()[-1].startswith("error: training would refuse this data set: 2 rows with errors")


def test_metadata_that_cannot_be_read_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "metadata.csv").write_bytes("image,prompt\nimage_0.png,caf\xe9\n".encode("latin-1"))
    assert run(str(folder), "--json") == 2
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [finding["kind"] for finding in found] == ["unusable data set"]
    assert "metadata.csv" in found[0]["message"]


def test_json_alone_is_on_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "metadata.csv").open("a", encoding="utf-8") as file:
        file.write('image_0.png,"\x1b[31mred"\n')
    assert run(str(folder), "--json", "--height", "640", "--width", "640", "--num_workers", "1") == 0
    shown = capsys.readouterr().out
    report = json.loads(shown)
    assert "\x1b" not in shown
    assert (report["rows"], report["pictures"], report["buckets"]) == (5, 4, {"640x640": 5})
    kinds = [finding["kind"] for finding in report["findings"]]
    assert kinds.count("enlarged") == 4
    assert "file named twice" in kinds


def test_captions_cannot_colour_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "metadata.csv").open("a", encoding="utf-8") as file:
        file.write('image_0.png,"[bold]\x1b[31mred"\nimage_1.png,"[bold]\x1b[31mred"\n')
    assert run(str(folder)) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "[bold]" in shown


def test_contact_sheet_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(folder), "--html", str(folder.parent / "report.html")) == 0
    assert (folder.parent / "report.html").read_text(encoding="utf-8").count("<img") == 4
    assert sorted(path.name for path in folder.iterdir()) == [*(f"image_{i}.png" for i in range(4)), "metadata.csv"]


def test_limit_of_captions_and_further_columns_can_be_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(folder), "--max_sequence_length", "4", "--extra_inputs", "control", "--json") == 2
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert sum(finding["kind"] == "long caption" for finding in findings) == 4
    assert [finding["message"].partition(";")[0] for finding in findings if finding["kind"] == "missing column"] == [
        f"{folder / 'metadata.csv'} has no column 'control'"]


def test_family_without_files_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(folder), "--family", "any") == 2
    assert "--family says nothing without the files of a model" in capsys.readouterr().err
