"""Promise 1: every adapter we write works elsewhere at the same strength. Training, saving, loading."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth.adapters import files
from diffsynth.adapters.files import save_lora
from diffsynth.adapters.formats import ADAPTER_METADATA, FORMATS, to_tensors
from diffsynth.adapters.lora import add_lora_file, lora_state
from diffsynth.adapters.names import family_names
from diffsynth.adapters.state import LoraState
from diffsynth.core.errors import UserError
from diffsynth.trainers.run import load_pipeline_class
from tests.recorded_names import tool

from .lora_states import ALPHA, RANK, command, named_everywhere, random_state
from .tiny import FamilyAtWork


class Trained:
    """A LoRA on the denoiser as a run leaves it: in memory, and in the file of that run."""

    def __init__(self, family: FamilyAtWork, pictures: Path, folder: Path) -> None:
        module = family.train(pictures, folder / "run", lora_rank=RANK, lora_alpha=ALPHA, learning_rate=1e-2,
                              num_epochs=1, max_steps=2, save_steps=2)
        self.component = module.lora_models[0]
        self.state = lora_state(getattr(module.pipe, self.component))
        self.path = next((folder / "run").glob("*.safetensors"))


@pytest.fixture(scope="session")
def trained(family: FamilyAtWork, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(family, pictures, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def denoiser(family: FamilyAtWork) -> tuple[str, torch.nn.Module, Path]:
    """Name of the denoiser, the network, and its file; not to be changed."""
    pipe = family.pipeline()
    name = pipe.denoiser_models[0]
    return name, pipe.denoiser, pipe.component_paths[name][0]


def loaded_by_diffusers(family: FamilyAtWork, network: torch.nn.Module, path: Path, caplog) -> dict[str, object]:
    """Layers to which the real diffusers loader gave an adapter; nothing may have been left unmatched."""
    import diffusers.utils.logging as diffusers_logging

    pipe = family.tiny.diffusers_pipeline(network)
    diffusers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        pipe.load_lora_weights(path, adapter_name="ours")
    diffusers_logging.disable_propagation()
    for phrase in ("unexpected keys", "missing keys", "Unsupported keys", "not found"):
        assert phrase not in caplog.text
    return {name: layer for name, layer in network.named_modules()
            if hasattr(layer, "lora_A") and "ours" in layer.lora_A}


def assert_same_change_there(layers: dict, state: LoraState) -> None:
    assert layers.keys() == state.layers.keys()
    for name, theirs in layers.items():
        ours = state.layers[name]
        up = torch.cat([theirs.scaling["ours"] * theirs.lora_B["ours"].weight.detach(), -ours.scale * ours.up], dim=1)
        difference = up @ torch.cat([theirs.lora_A["ours"].weight.detach(), ours.down])
        assert max(float(difference.max()), -float(difference.min())) <= 1e-6, name


# ---- training, saving, loading elsewhere


def test_trained_file_is_loaded_by_diffusers_at_the_same_strength(family, trained, denoiser, tmp_path, caplog):
    assert all(layer.scale == ALPHA / RANK and layer.up.any() for layer in trained.state.layers.values())
    command("convert", "lora", trained.path, tmp_path / "lora.safetensors", "--format", "diffusers")
    network = type(denoiser[1]).from_config(denoiser[1].config)
    layers = loaded_by_diffusers(family, network, tmp_path / "lora.safetensors", caplog)
    assert_same_change_there(layers, trained.state)


@pytest.mark.parametrize("fmt", ["kohya", "comfyui"])
def test_fused_names_are_loaded_by_diffusers_at_the_same_strength(family, denoiser, tmp_path, caplog, fmt):
    """At the published width, which its converters take for granted; a weight is one number over the full shape."""
    network = family.tiny.published_width()
    shapes = named_everywhere(family, denoiser[0], network)
    for layer in network.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, torch.nn.Parameter(torch.zeros(1).expand(parameter.shape), requires_grad=False))
    state = random_state({name: shape for name, shape in shapes.items() if "blocks" in name})
    save_lora(tmp_path / "lora.safetensors", {denoiser[0]: state}, family.family, fmt)
    assert_same_change_there(loaded_by_diffusers(family, network, tmp_path / "lora.safetensors", caplog), state)


@pytest.mark.parametrize("fmt", FORMATS)
def test_names_and_changes_equal_the_recorded_ones(family, denoiser, tmp_path, fmt):
    component, network, _ = denoiser
    state = random_state(named_everywhere(family, component, network))
    save_lora(tmp_path / "plain.safetensors", {component: state}, family.family, "diffusers")
    save_lora(tmp_path / "lora.safetensors", {component: state}, family.family, fmt)
    errors, warnings, info = tool("check_lora").check(
        tmp_path / "lora.safetensors", family.tiny.recorded_names, fmt, shapes="ignore", metadata="require")
    assert (errors, warnings) == ([], [])
    assert info["modules"] > 10
    formats = ["diffusers", fmt]
    changes = [tool("delta").effective(tmp_path / name, family.tiny.recorded_names, kind, formats)
               for name, kind in (("plain.safetensors", "diffusers"), ("lora.safetensors", fmt))]
    worst, size, _, where, only_first, only_second = tool("delta").compare(*changes)
    assert worst <= 1e-6, where
    assert size > 0.01
    assert only_first == only_second == []


def without(pattern: str):
    """Leave tensors out of every file."""
    def spoil(tensors: dict, metadata: dict) -> None:
        for key in [key for key in tensors if re.search(pattern, key)]:
            del tensors[key]
    return spoil


def without_strength(tensors: dict, metadata: dict) -> None:
    peft = json.loads(metadata[ADAPTER_METADATA])
    metadata[ADAPTER_METADATA] = json.dumps({k: v for k, v in peft.items() if not k.endswith("lora_alpha")})


def nudged(tensors: dict, metadata: dict) -> None:
    key = next(key for key in tensors if re.search("lora_(B|up)", key))
    tensors[key] = tensors[key] + 1e-3


@pytest.mark.parametrize(("fmt", "dora", "spoil"), [
    ("kohya", False, without(r"\.alpha$")), ("comfyui", False, without(r"\.alpha$")),
    ("diffusers", False, without_strength), ("diffusers", False, lambda t, m: m.pop(ADAPTER_METADATA)),
    ("diffusers", True, without("magnitude")), ("diffsynth", False, nudged), ("diffusers", False, nudged),
    *((fmt, False, without("_0_|[.]0[.]")) for fmt in FORMATS),
])
@pytest.mark.parametrize("effect", [0.0, 1.0])
def test_a_file_that_is_not_what_was_meant_is_never_there(
    family, trained, tmp_path, monkeypatch, fmt, dora, spoil, effect
):
    """Also for a LoRA without effect yet, whose change of the weights would not tell."""
    layers = {name: replace(layer, up=layer.up * effect, dora_scale=torch.ones(len(layer.up)) if dora else None)
              for name, layer in trained.state.layers.items()}
    states = {trained.component: LoraState(layers)}
    path = tmp_path / "lora.safetensors"
    save_lora(path, states, family.family, fmt)
    before = path.read_bytes()
    make_tensors, make_metadata = files.to_tensors, files.file_metadata
    spoilt: dict[str, dict] = {}

    def tensors(*arguments, **options):
        made = make_tensors(*arguments, **options)
        metadata = make_metadata(states, made, family.family, fmt)
        spoil(made, metadata)
        spoilt["metadata"] = metadata
        return made

    monkeypatch.setattr(files, "to_tensors", tensors)
    monkeypatch.setattr(files, "file_metadata", lambda *_: spoilt["metadata"])
    with pytest.raises(RuntimeError, match="was not written"):
        save_lora(path, states, family.family, fmt)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_values_that_are_not_finite_are_not_written(family, trained, tmp_path):
    name, layer = next(iter(trained.state.layers.items()))
    broken = replace(layer, up=layer.up.index_fill(0, torch.tensor([1]), float("nan")))
    with pytest.raises(UserError, match=f"layer '{name}' of {trained.component} holds values that are not finite"):
        save_lora(tmp_path / "x.safetensors", {trained.component: LoraState({name: broken})}, family.family)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hotload", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_loading_says_how_much_matched(family, trained, denoiser, tmp_path, caplog, fmt, hotload):
    save_lora(tmp_path / "lora.safetensors", {trained.component: trained.state}, family.family, fmt)
    network = type(denoiser[1]).from_config(denoiser[1].config)
    with caplog.at_level(logging.INFO):
        add_lora_file(network, trained.component, tmp_path / "lora.safetensors", family.family, hot=hotload)
    layers = len(trained.state.layers)
    modules = sum(bool(re.search("lora_(A|down)", key)) for key in load_file(tmp_path / "lora.safetensors"))
    assert f"matched {modules} of {modules} modules ({layers} layers of" in caplog.text
    assert f"changed {layers} of {layers} layers" in caplog.text


def test_unmatched_keys_are_refused_unless_allowed(family, trained, denoiser, tmp_path, caplog):
    tensors = to_tensors({trained.component: trained.state}, family.family, "diffusers")
    count = len(trained.state.layers)
    prefix = family_names(family.family).components[trained.component].diffusers
    tensors |= {f"{prefix}nowhere.lora_A.weight": torch.ones(2, 2), f"{prefix}nowhere.lora_B.weight": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "lora.safetensors")
    pipe = load_pipeline_class(family.family)()
    network = type(denoiser[1]).from_config(denoiser[1].config)
    setattr(pipe, trained.component, network)
    weights = {name: weight.clone() for name, weight in network.state_dict().items()}
    with pytest.raises(UserError, match=f"only {count} of its {count + 1} layers match.*nowhere"):
        pipe.load_lora(network, tmp_path / "lora.safetensors")
    assert all(torch.equal(weight, weights[name]) for name, weight in network.state_dict().items())
    with caplog.at_level(logging.INFO):
        pipe.load_lora(network, tmp_path / "lora.safetensors", allow_unmatched=True)
    assert f"matched {count} of {count + 1} modules" in caplog.text
    assert "ignored 2 tensors" in caplog.text
    changed = {name.removesuffix(".weight") for name, weight in network.state_dict().items()
               if not torch.equal(weight, weights[name])}
    assert changed == trained.state.layers.keys()
