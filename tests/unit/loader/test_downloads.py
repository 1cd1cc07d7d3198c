"""Downloads against a hub on this machine, through the real clients: places, resuming, skipping, names."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from local_hub import Hub, local_hub

from diffsynth.core.errors import UserError
from diffsynth.core.loader import ModelConfig
from diffsynth.core.loader.download import is_complete
from diffsynth.models.download import download_models, presets

SOURCES = ["huggingface", "modelscope"]
LARGE = 25_000_000  # the Hugging Face client writes 10 MB at a time
SCRIPT = """
import json, sys
from diffsynth import ModelConfig, download_models
from diffsynth.core.errors import UserError
try:
    if sys.argv[1] == "preset":
        found = download_models(sys.argv[2:])
    else:
        found = ModelConfig(model_id=sys.argv[2], origin_file_pattern=sys.argv[3]).resolve()
    print(json.dumps([path.as_posix() for path in found]))
except UserError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """Two repositories with the files of the older page's FLUX, and a sharded one."""
    names = ["ae.safetensors", "flux1-dev.safetensors", "text_encoder/model.safetensors", "text_encoder/config.json",
             "text_encoder_2/config.json", "text_encoder_2/model-00001-of-00002.safetensors",
             "text_encoder_2/model-00002-of-00002.safetensors", "text_encoder_2/model.safetensors.index.json",
             "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/spiece.model", "README.md",
             "transformer/diffusion_pytorch_model.safetensors"]
    for owner in ("black-forest-labs", "AI-ModelScope"):
        for name in names:
            path = tmp_path / "hub" / owner / "FLUX.1-dev" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode() * 10)
    large = tmp_path / "hub" / "owner" / "Large" / "model.safetensors"
    large.parent.mkdir(parents=True)
    large.write_bytes(bytes(range(256)) * (LARGE // 256))
    with local_hub(tmp_path / "hub") as serving:
        yield serving


def environment(hub: Hub, source: str, **more: str) -> dict[str, str]:
    home = hub.root.parent
    return {**os.environ, "HF_ENDPOINT": hub.endpoint, "MODELSCOPE_ENDPOINT": hub.endpoint,
            "HF_HOME": str(home / "hf"), "MODELSCOPE_CACHE": str(home / "ms"), "MODELSCOPE_HOME": str(home / "ms_home"),
            "HF_HUB_OFFLINE": "0", "DIFFSYNTH_DOWNLOAD_SOURCE": source, "NO_PROXY": "127.0.0.1",
            "DIFFSYNTH_MODEL_BASE_PATH": str(home / "models"), "DIFFSYNTH_SKIP_DOWNLOAD": "False", **more}


def run(hub: Hub, source: str, *words: str, **more: str):
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], env=environment(hub, source, **more),
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("source", SOURCES)
def test_preset_lands_as_the_older_page_shows(hub: Hub, source: str):
    (folder,) = run(hub, source, "preset", "FLUX.1-dev")
    models = hub.root.parent / "models"
    assert Path(folder) == models / "FLUX" / "FLUX.1-dev"
    files = {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*")
             if path.is_file() and ".cache" not in path.parts}
    assert files == {"ae.safetensors", "flux1-dev.safetensors", "text_encoder/model.safetensors",
                     "text_encoder_2/config.json", "text_encoder_2/model-00001-of-00002.safetensors",
                     "text_encoder_2/model-00002-of-00002.safetensors", "text_encoder_2/model.safetensors.index.json",
                     "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/spiece.model"}
    before = len(hub.requests)
    assert run(hub, source, "preset", "FLUX.1-dev", DIFFSYNTH_SKIP_DOWNLOAD="True") == [folder]
    assert len(hub.requests) == before, "complete and skipping: nothing may be asked"


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("pattern", "files"),
    [("flux1-dev.safetensors", ["flux1-dev.safetensors"]), ("tokenizer/", ["tokenizer"]),
     ("text_encoder_2/model*.safetensors", ["text_encoder_2/model-00001-of-00002.safetensors",
                                            "text_encoder_2/model-00002-of-00002.safetensors"])],
)
def test_patterns_land_below_the_model_id(hub: Hub, source: str, pattern: str, files: list[str]):
    found = run(hub, source, "config", "black-forest-labs/FLUX.1-dev", pattern)
    place = hub.root.parent / "models" / "black-forest-labs" / "FLUX.1-dev"
    assert [Path(path) for path in found] == [place / name for name in files]
    assert not (place / "README.md").exists()
    assert not (place / "ae.safetensors").exists()


@pytest.mark.parametrize("source", SOURCES)
def test_interrupted_download_continues_where_it_stopped(hub: Hub, source: str):
    hub.stall_after = 22_000_000
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, "config", "owner/Large", "*.safetensors"],
                               env=environment(hub, source), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert hub.stalled.wait(60)
    target = hub.root.parent / "models" / "owner" / "Large"
    wait_for_bytes(target, 10_000_000)
    process.kill()
    process.wait()
    hub.stall_after = None
    hub.released.set()
    assert "error" in run(hub, source, "config", "owner/Large", "*.safetensors", DIFFSYNTH_SKIP_DOWNLOAD="True")
    hub.requests.clear()
    (path,) = run(hub, source, "config", "owner/Large", "*.safetensors")
    assert Path(path).read_bytes() == (hub.root / "owner" / "Large" / "model.safetensors").read_bytes()
    (asked,) = hub.fetched("model.safetensors")
    assert asked is not None, "the second run must ask only for the rest"
    assert int(asked.removeprefix("bytes=").split("-")[0]) >= 10_000_000


def wait_for_bytes(folder: Path, count: int) -> None:
    """Until the client has so much on the disk."""
    for _ in range(600):
        if sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) >= count:
            return
        time.sleep(0.1)
    pytest.fail("the client wrote nothing")


@pytest.mark.parametrize("source", SOURCES)
def test_complete_files_are_not_fetched_again(hub: Hub, source: str):
    for _ in range(2):
        run(hub, source, "config", "owner/Large", "*.safetensors")
    assert len(hub.fetched("model.safetensors")) == 1


@pytest.mark.parametrize("source", SOURCES)
def test_what_the_hub_does_not_have_is_named(hub: Hub, source: str):
    says = run(hub, source, "config", "owner/Large", "nothing*.bin")["error"]
    assert "nothing*.bin" in says
    says = run(hub, source, "config", "owner/Nobody", "*.safetensors")["error"]
    assert "owner/Nobody" in says
    assert "\n" not in says


@pytest.mark.parametrize("source", SOURCES)
def test_unreachable_hub_uses_what_is_complete(hub: Hub, source: str):
    path = hub.root.parent / "models" / "owner" / "Large" / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"put here by hand")
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}
    assert run(hub, source, "config", "owner/Large", "*.safetensors", **nowhere) == [path.as_posix()]
    assert "owner/Other" in run(hub, source, "config", "owner/Other", "*.safetensors", **nowhere)["error"]


def test_continued_file_with_a_wrong_beginning_is_discarded(hub: Hub):
    large = hub.root / "owner" / "Large" / "model.safetensors"
    etag = hashlib.sha256(large.read_bytes()).hexdigest()
    records = hub.root.parent / "models" / "owner" / "Large" / ".cache" / "diffsynth"
    records.mkdir(parents=True)
    (records / f"model.safetensors.{etag[:16]}.incomplete").write_bytes(b"wrong")
    assert "damaged" in run(hub, "huggingface", "config", "owner/Large", "*.safetensors")["error"]
    (path,) = run(hub, "huggingface", "config", "owner/Large", "*.safetensors")
    assert Path(path).read_bytes() == large.read_bytes()


def test_skipping_with_missing_files_says_what_to_fetch_and_where(tmp_path: Path):
    config = ModelConfig(model_id="owner/Tiny", origin_file_pattern="dit*.safetensors", local_model_path=tmp_path,
                         skip_download=True, download_source="huggingface")
    with pytest.raises(UserError, match=r"dit\*\.safetensors of owner/Tiny") as error:
        config.resolve()
    assert "https://huggingface.co/owner/Tiny" in str(error.value)
    assert str(tmp_path / "owner" / "Tiny") in str(error.value)
    (tmp_path / "owner" / "Tiny").mkdir(parents=True)
    first = tmp_path / "owner" / "Tiny" / "dit-00001-of-00002.safetensors"
    first.write_bytes(b"x")
    with pytest.raises(UserError, match="is not in"):
        config.resolve()
    second = first.with_name("dit-00002-of-00002.safetensors")
    second.write_bytes(b"x")
    assert config.resolve() == [first, second]


def test_leftovers_of_a_download_do_not_count(tmp_path: Path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.safetensors").write_bytes(b"x")
    (tmp_path / "a.safetensors.incomplete").write_bytes(b"x")
    assert not is_complete(tmp_path, "*")


def test_environment_decides_where_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "True")
    file = tmp_path / "owner" / "Tiny" / "a.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    assert ModelConfig(model_id="owner/Tiny", origin_file_pattern="a*").resolve() == [file]
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        ModelConfig(model_id="owner/Tiny", origin_file_pattern="a*").resolve()


def test_unknown_preset_suggests_a_known_one():
    with pytest.raises(UserError, match=r"Did you mean 'FLUX\.1-dev'"):
        download_models(["FLUX1-dev"])
    assert "FLUX.1-dev" in presets()


@pytest.mark.parametrize("arguments", [{}, {"path": "x", "model_id": "y"}, {"model_id": "y", "download_source": "z"}])
def test_contradicting_configs_are_refused(arguments: dict[str, str]):
    with pytest.raises(UserError):
        ModelConfig(**arguments)
