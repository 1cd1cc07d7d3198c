"""Promise 10: opening a file never runs code, never costs much, and reaches no other machine."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth.core.data.cache import CacheStore
from diffsynth.core.errors import UserError
from diffsynth.core.loader import WeightReader
from diffsynth.core.loader.files import weight_groups
from diffsynth.diffusion.checkpoint import load_state
from diffsynth.models.inspection import inspect_files
from tests import fuzz_targets, hostile
from tests.contract.refusals import cheap, ends_with_2, refused
from tests.contract.tiny import FamilyAtWork, process_environment

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, about the damage that is meant


# -- weights


def test_pickles_that_run_code_are_refused_as_weights(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for path in hostile.malicious_pickles(tmp_path, marker):
        with refused(str(path), folder=tmp_path):
            WeightReader(path)
        with refused(path.name, folder=tmp_path):
            inspect_files(path)
        assert not marker.exists(), path
    with (tmp_path / "exec.pt").open("rb") as file:
        pickle.load(file)
    assert marker.exists(), "the attack itself must work, or this test shows nothing"


def test_pickles_that_fill_the_memory_or_take_for_ever_are_refused(tmp_path: Path) -> None:
    for path in hostile.pickle_bombs(tmp_path):
        with refused(str(path), folder=tmp_path):
            WeightReader(path)


def test_checkpoints_of_other_programs_still_load(tmp_path: Path) -> None:
    """The doors that are shut above must not be shut for what people have."""
    layer = torch.nn.Linear(3, 3).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    for zipped in (True, False):
        torch.save(
            {
                "state_dict": layer.state_dict(), "optimizer_states": [optimizer.state_dict()], "epoch": 3,
                "rng": torch.get_rng_state(),
            },
            tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped,
        )
        with WeightReader(tmp_path / "a.ckpt") as reader:
            assert torch.equal(reader.get("weight"), layer.weight)
    torch.save(
        {
            "p": torch.nn.Parameter(torch.ones(2)), "f8": torch.ones(2).to(torch.float8_e4m3fn),
            "shared": torch.arange(4.0)[1:3],
        },
        tmp_path / "b.pt",
    )
    with WeightReader(tmp_path / "b.pt") as reader:
        assert reader.get("shared").tolist() == [1, 2]


@pytest.mark.parametrize("name", hostile.headers())
def test_headers_that_lie_are_refused(tmp_path: Path, name: str) -> None:
    header, num_bytes = hostile.headers()[name]
    path = hostile.write_header(tmp_path / "x.safetensors", header, num_bytes)
    with refused(str(path), folder=tmp_path):
        WeightReader(path)


@pytest.mark.parametrize("length", [0, 3, 2**25 + 1, 2**40, 2**63, 2**64 - 1])
def test_header_lengths_that_lie_are_refused(tmp_path: Path, length: int) -> None:
    path = hostile.write_header(tmp_path / "x.safetensors", b'{"a":1}', 0 if length != 2**25 + 1 else 2**26, length)
    with refused(str(path)):
        WeightReader(path)


@pytest.mark.parametrize(
    "content",
    [
        {"weight_map": {"a": "../secret.safetensors"}}, {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": "sub/x.safetensors"}}, {"weight_map": {"a": "..\\secret.safetensors"}},
        {"weight_map": {"a": "C:\\secret.safetensors"}}, {"weight_map": {"a": ".."}}, {"weight_map": {"a": "x\0"}},
        {"weight_map": {"a": "gone.safetensors"}}, {"weight_map": {"a": "loop.safetensors"}},
        {"weight_map": {"a": ""}}, {"weight_map": {"a": "m.safetensors.index.json"}},
        {"weight_map": {"a": 3, "b": "x"}}, {"weight_map": {"a": ["x"]}}, {"weight_map": []}, {"a": 1}, [], 3,
        b"[" * 100_000, b"\xff\xfe", b"9" * 5000, b"",
    ],
)
def test_indexes_that_lead_elsewhere_are_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    index = folder / "m.safetensors.index.json"
    index.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with refused("m.safetensors.index.json", folder=tmp_path):
        for group in weight_groups(index):
            WeightReader(group)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**5), ("num_layers", 10**5), ("max_position_embeddings", 10**7), ("vocab_size", -5),
        ("hidden_size", 1.5), ("block_out_channels", [4] * 10**6), ("hidden_size", [3]), ("num_attention_heads", "8"),
        ("num_hidden_layers", float("nan")),
    ],
)
def test_configurations_cannot_make_a_network_larger_than_its_weights(
    family: FamilyAtWork, tmp_path: Path, key: str, value: Any
) -> None:
    tried = False
    for source in family.model_files:
        for group in weight_groups(source):
            described = inspect_files(list(group))["components"]
            if len(described) != 1 or key not in described[0]["config"]:
                continue
            tried = True
            folder = tmp_path / described[0]["name"]
            folder.mkdir()
            for shard in group:
                tensors = load_file(shard)
                save_file(tensors, folder / shard.name, {"config": json.dumps({key: value})})
            with refused(key):
                inspect_files(folder)
    if not tried:
        pytest.skip(f"no network of {family.name} has {key}")


@pytest.mark.parametrize("change", ["superscript", "many_digits", 0, 1, 3])
def test_weights_of_impossible_names_and_shapes_are_refused(
    family: FamilyAtWork, tmp_path: Path, change: str | int
) -> None:
    """Another number of a block, or every size replaced: headers that are right in themselves."""
    for source in family.model_files:
        group = weight_groups(source)[0]
        described: dict[str, Any] = {}
        position = 0
        with WeightReader(group) as reader:
            for name, (shape, _) in reader.tensors.items():
                sizes = list(shape) if isinstance(change, str) else [change] * len(shape)
                end = position + math.prod(sizes)
                described[name] = {"dtype": "I8", "shape": sizes, "data_offsets": [position, end]}
                position = end
        if isinstance(change, str):
            number = {"superscript": "\u00b2", "many_digits": "9" * 400}[change]
            more = {name.replace(".0.", f".{number}.", 1) for name in described} - described.keys()
            described |= {name: {"dtype": "I8", "shape": [0], "data_offsets": [position, position]} for name in more}
        path = hostile.write_header(tmp_path / "x.safetensors", json.dumps(described).encode(), position)
        with cheap():
            try:
                inspect_files(path)
            except UserError as error:
                assert str(path) in str(error)  # noqa: PT017


def test_configurations_name_no_code(family: FamilyAtWork, tmp_path: Path) -> None:
    """``auto_map``, kernels of a hub and classes of another name are not looked at."""
    models = shutil.copytree(family.folder, tmp_path / "models")
    marker = tmp_path / "marker"
    evil = f"open({str(marker)!r}, 'w').close()\n"
    for path in [*models.rglob("config.json"), *models.rglob("tokenizer_config.json")]:
        values = json.loads(path.read_text(encoding="utf-8"))
        values |= {
            "auto_map": {name: "evil.Evil" for name in ("AutoModel", "AutoConfig", "AutoTokenizer")},
            "trust_remote_code": True, "attn_implementation": "somebody/kernel", "num_labels": 7,
            "quantization_config": {"quant_method": "evil"}, "tokenizer_class": "Evil", "custom_pipeline": "evil.py",
            "_commit_hash": "x",
        }
        path.write_text(json.dumps(values), encoding="utf-8")
        (path.parent / "evil.py").write_text(evil, encoding="utf-8")
    copy = FamilyAtWork.__new__(FamilyAtWork)
    copy.tiny, copy.folder, copy.name, copy.family = family.tiny, models, family.name, family.family
    copy.pipeline()
    assert not marker.exists()


def test_tokenizers_that_are_none_are_refused(family: FamilyAtWork, tmp_path: Path) -> None:
    from diffsynth.models.tokenizers import load_tokenizer

    name, (class_path, folder_name) = next(iter(family.family.tokenizers.items()))
    original = next(path for path in family.folder.rglob(folder_name) if path.is_dir())
    good = json.loads((original / "tokenizer.json").read_text(encoding="utf-8"))
    bad_pattern = {"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
    for number, (file, content) in enumerate(
        (
            ("tokenizer.json", b"[" * 100_000), ("tokenizer.json", b"{}"),
            ("tokenizer.json", b"\x80\x02cos\nsystem\n."),
            ("tokenizer.json", json.dumps({**good, "pre_tokenizer": bad_pattern}).encode()),
            ("tokenizer_config.json", b"[1]"), ("tokenizer_config.json", b"[" * 100_000),
            ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "y"}}}'),
        )
    ):
        folder = shutil.copytree(original, tmp_path / f"{name}{number}" / folder_name)
        (folder / file).write_bytes(content)
        with refused(str(folder)):
            load_tokenizer(class_path, folder_name, None, [folder.parent / "weights.safetensors"], family.family)


# -- LoRA files, at every door


def test_malicious_lora_files_are_refused_at_every_door(
    family: FamilyAtWork, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    marker, lora = tmp_path / "marker", tmp_path / "lora.ckpt"
    torch.save({"a.lora_A.weight": torch.zeros(2, 2), "x": hostile.calls(marker)["os_system"]}, lora)
    denoiser = str(family.tiny.options["lora_base_model"])
    train = ["train", *family.words(pictures, tmp_path / "out", max_steps=1)]
    generate = [
        "generate", "--model_paths", json.dumps(family.model_files), "--device", "cpu", "--torch_dtype", "float32",
        "--height", "32", "--width", "32", "--num_inference_steps", "1",
    ]
    for words in (
        [*train, "--lora_checkpoint", str(lora)],
        [*train, "--preset_lora_path", str(lora), "--preset_lora_model", denoiser],
        [*generate, "--lora", f"{lora}:0.5"], ["inspect", str(lora)],
        ["convert", "lora", str(lora), "new.safetensors", "--format", "kohya"],
    ):
        ends_with_2(words, capsys, "lora.ckpt", "could run code")
        assert not marker.exists()
    pipe = family.pipeline()
    with refused("could run code"):
        pipe.load_lora(getattr(pipe, denoiser), lora)
    assert not marker.exists()
    assert not (tmp_path / "new.safetensors").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "described",
    [
        "[" * 5000, "[1]", '{"transformer.r": 2, "transformer.alpha_pattern": {"(a+)+$": 1}}', "\ud800",
        '{"transformer.r": 1, "transformer.lora_alpha": 1e999}',
        '{"transformer.r": 1, "transformer.alpha_pattern": {"((((": 1}}',
        '{"transformer.r": 1, "transformer.lora_alpha": ' + "9" * 400 + "}",
        '{"transformer.r": 1, "transformer.alpha_pattern": {"a{99999999999999}": 1}}',
        '{"transformer.r": 1, "transformer.lora_alpha": "x"}',
    ],
)
def test_strengths_that_are_none_are_refused(described: str) -> None:
    from diffsynth.adapters.reading import from_tensors
    from diffsynth.models.registry import get_family

    module = next(name for name in fuzz_targets._modules() if name.startswith("transformer."))
    tensors = {f"{module}.lora_A.weight": torch.ones(1, 21), f"{module}.lora_B.weight": torch.ones(21, 1)}
    with refused("metadata"):
        from_tensors(tensors, tensors.__getitem__, {"lora_adapter_metadata": described}, get_family("flux"))


# -- states, caches, replay files, recipes


def _reseal(folder: Path) -> None:
    manifest = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _change(*path: str | int, to: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        document = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        place = document
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = to
        (folder / "state.json").write_text(json.dumps(document), encoding="utf-8")

    return change


def _pickled(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        torch.save({"x": hostile.calls(folder.parents[2] / "marker")["mkdir"]}, folder / name)

    return change


def _one_number(folder: Path) -> None:
    weights = load_file(folder / "weights.safetensors")
    save_file({name: torch.zeros(1) for name in weights}, folder / "weights.safetensors")


STATES: dict[str, Callable[[Path], object]] = {
    "pickled_weights": _pickled("weights.safetensors"), "pickled_optimizer": _pickled("optimizer.safetensors"),
    "one_number_for_all": _one_number,
    "no_json": lambda folder: (folder / "state.json").write_bytes(b"\x80\x02cos\nsystem\n."),
    "deep": lambda folder: (folder / "state.json").write_bytes(b"[" * 100_000),
    "list": lambda folder: (folder / "state.json").write_bytes(b"[]"), "step": _change("progress", "step", to="9; rm"),
    "nan": _change("progress", "epoch", to=float("nan")), "unknown": _change("progress", "__class__", to="x"),
    "parts": _change("progress", "parts", to=[[1e400, 2]]), "method": _change("lr_scheduler", "step", to=5),
    "learning_rate": _change("optimizer", "param_groups", 0, "lr", to="1e-3"),
    "groups": _change("optimizer", "param_groups", to={}), "schedule": _change("lr_scheduler", to=None),
    "indices": _change("optimizer", "scalars", to={"x": {}}),
}


@pytest.fixture(scope="module")
def finished_run(family: FamilyAtWork, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp(f"safety-{family.name}") / "run"
    family.train(pictures, output, max_steps=1)
    return output


@pytest.mark.parametrize("name", STATES)
def test_states_of_somebody_else_are_refused(
    family: FamilyAtWork, pictures: Path, finished_run: Path, tmp_path: Path, name: str
) -> None:
    output = shutil.copytree(finished_run, tmp_path / "run")
    state = next((output / "state").glob("step-*"))
    STATES[name](state)
    _reseal(state)
    with refused(str(state), seconds=30) if name in ("list", "deep") else pytest.raises(UserError):
        if name.startswith("pickled"):
            load_state(state)
        else:
            family.train(
                pictures, output, max_steps=2, resume="auto",
                cache_path=str(finished_run.parent / f"{finished_run.name}-cache"),
            )
    assert not (tmp_path / "marker").exists()


def test_cache_packs_that_are_none_are_left_out(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    store = CacheStore(tmp_path / "cache")
    store.put("0" * 40, {"x": torch.ones(2)})
    packs = tmp_path / "cache" / "packs"
    good = next(packs.iterdir())
    torch.save({"x": hostile.calls(marker)["mkdir"]}, packs / "evil.safetensors")
    (packs / "empty.safetensors").write_bytes(b"")
    (packs / "deep.safetensors").symlink_to(packs / "deep.safetensors")
    for number, (header, num_bytes) in enumerate(hostile.headers().values()):
        hostile.write_header(packs / f"lie{number}.safetensors", header, num_bytes)
    fresh = CacheStore(tmp_path / "cache")
    assert torch.equal(fresh.get("0" * 40)["x"], torch.ones(2))
    assert not marker.exists()
    assert set(fresh.packs) == {good.name}


DOCUMENTS = (
    "{}", "[]", "3", "[" * 100_000, "9" * 5000, '{"version": "x"}', '{"version": 1e400}',
    '{"version": 1, "batches": {"a": 1}}',
    '{"version": 1, "config": {"optimizer": "os.system"}, "batches": [{"data": {}}]}',
    '{"version": 1, "batches": [{"data": {"picture": "x"}}]}',
    '{"version": 1, "batches": [{"data": ' + '{"list": [' * 5000 + "1" + "]}" * 5000 + "}]}", "\ud800", "not json", "",
)


@pytest.mark.parametrize("text", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_replay_files_and_recipes_of_somebody_else_are_refused(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffsynth.diffusion.picture_recipe import read_recipe
    from diffsynth.diffusion.replay import read_replay

    replay, picture = tmp_path / "step-1.safetensors", tmp_path / "a.png"
    header = json.dumps({"__metadata__": {"replay": text}}).encode()
    hostile.write_header(replay, header, 0)
    chunk = hostile._chunk(b"tEXt", b"diffsynth\0" + text.encode("utf-8", "surrogatepass"))
    picture.write_bytes(hostile._png(8, 8, chunk, pixels=bytes(8 * 25)))
    with refused(str(replay), folder=tmp_path):
        read_replay(replay)
    with refused(str(picture), folder=tmp_path):
        read_recipe(picture)
    ends_with_2(["generate", "--from", str(picture), "--output", str(tmp_path / "b.png")], capsys, str(picture))


# -- the network


NO_NETWORK = """
import os, sys
def hook(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[:1]
        if isinstance(address, tuple):
            with open(os.environ["NETWORK_LOG"], "a", encoding="utf-8") as file:
                file.write(f"{event} {address}\\n")
            raise OSError("no network here")
sys.addaudithook(hook)
"""


def test_a_run_on_local_files_asks_no_other_machine(family: FamilyAtWork, pictures: Path, tmp_path: Path) -> None:
    """Real processes, without the variables that switch downloads off; every attempt is refused and noted."""
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "sitecustomize.py").write_text(NO_NETWORK, encoding="utf-8")
    log = tmp_path / "network.log"
    environment = process_environment(NETWORK_LOG=str(log), HOME=str(tmp_path / "home"))
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "hooks"), environment["PYTHONPATH"]])
    for name in ("DIFFSYNTH_SKIP_DOWNLOAD", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environment.pop(name, None)

    def run(*words: str) -> None:
        finished = subprocess.run(
            [sys.executable, *words], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr

    run("-m", "diffsynth", "train", *family.words(pictures, tmp_path / "out", max_steps=1))
    lora = next((tmp_path / "out").glob("*.safetensors"))
    run(
        "-m", "diffsynth", "generate", "--model_paths", json.dumps(family.model_files), "--device", "cpu",
        "--torch_dtype", "float32", "--height", "32", "--width", "32", "--num_inference_steps", "1", "--lora",
        str(lora), "--output", "a.png",
    )
    assert (tmp_path / "a.png").exists()
    assert not log.exists(), log.read_text(encoding="utf-8")
    run("-c", "import socket\ntry: socket.create_connection(('192.0.2.1', 9), 1)\nexcept OSError: pass")
    assert "192.0.2.1" in log.read_text(encoding="utf-8"), "an attempt must be seen, or this test shows nothing"
