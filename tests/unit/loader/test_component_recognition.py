"""Published files are recognised, built at full size on the meta device, and match name by name and shape by shape."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from weight_files import real_keys, write_sparse

from diffsynth.core.loader import WeightReader
from diffsynth.models.building import build_empty
from diffsynth.models.inspection import inspect_files
from diffsynth.models.keymap import KeyMap, rename, shapes_to_ours, split
from diffsynth.models.recognition import assign_weights, find_components
from diffsynth.models.registry import all_component_specs, get_family
from diffsynth.models.spec import ComponentSpec

LISTS = {
    "flux1-dev": ("dit", "original", 11_901_408_320),
    "flux-ae": ("vae", "original", 83_819_683),
    "flux-vae-diffusers": ("vae", "diffusers", 83_819_683),
    "flux-clip_l": ("text_encoder", "original", 123_060_480),
    "flux-t5xxl": ("text_encoder_2", "diffusers", 4_762_310_656),
}
PUBLISHED_DIT = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}  # fmt: skip


@pytest.mark.parametrize("name", list(LISTS))
def test_published_lists_match_completely(name: str, tmp_path: Path):
    path = write_sparse(tmp_path / "x.safetensors", real_keys(name))
    component, layout, num_parameters = LISTS[name]
    with WeightReader(path) as reader:
        (found,) = find_components(reader, all_component_specs())
        module = build_empty(found.spec, found.config)
        state = module.state_dict()
        assert assign_weights(reader.tensors, [found], [state]) == []
        assert (found.spec.default_name, found.layout.name) == (component, layout)
        assert found.missing == found.unexpected == []
        filled = set()
        for key, match in found.sources.items():
            for ours, shape in zip(match.ours, shapes_to_ours(match.rule, reader.tensors[key].shape), strict=True):
                assert tuple(state[ours].shape) == shape
                filled.add(ours)
        assert set(state) - filled <= set(found.spec.tied)
    assert all(parameter.is_meta for parameter in module.parameters())
    (described,) = inspect_files(path)["components"]
    assert described["num_parameters"] == num_parameters
    assert described["missing"] == described["unexpected"] == []


def test_schnell_has_no_guidance(tmp_path: Path):
    keys = {key: shape for key, shape in real_keys("flux1-dev").items() if not key.startswith("guidance_in.")}
    (described,) = inspect_files(write_sparse(tmp_path / "x.safetensors", keys))["components"]
    assert described["config"]["guidance_embeds"] is False
    assert described["missing"] == described["unexpected"] == []


@pytest.mark.parametrize("spec", all_component_specs(), ids=lambda spec: spec.kind)
def test_listed_names_are_those_of_the_class(spec: ComponentSpec, tmp_path: Path):
    """``inspect`` trusts the tables; here the class confirms them."""
    name = next(name for name, (component, _, _) in LISTS.items() if component == spec.default_name)
    with WeightReader(write_sparse(tmp_path / "x.safetensors", real_keys(name))) as reader:
        (found,) = find_components(reader, [spec])
    names = spec.our_names(found.config)
    assert len(names) == len(set(names))
    assert set(names) == set(build_empty(spec, found.config).state_dict())


@pytest.mark.parametrize("name", ["flux1-dev", "flux-ae", "flux-clip_l"])
def test_key_map_covers_every_original_key_and_inverts(name: str, tmp_path: Path):
    shapes = real_keys(name)
    with WeightReader(write_sparse(tmp_path / "x.safetensors", shapes)) as reader:
        (found,) = find_components(reader, all_component_specs())
    table = found.key_map
    assert table is not None
    # rows count themselves: any row that is lost, doubled or moved changes a number
    small = {key: torch.arange(42.0 * 2 ** (len(shape) > 1)).reshape(42, *[2, 1, 1][: len(shape) - 1])
             for key, shape in shapes.items()}
    ours = table.to_ours(small)
    back = table.to_original(ours)
    assert set(back) == set(shapes)
    for key, value in small.items():
        assert torch.equal(back[key], value), key
    assert set(ours) == set(found.spec.our_names(found.config))


def test_key_map_rows_go_where_the_table_says():
    table = KeyMap((split("a.{n}.qkv.*", ["b.{n}.q.*", "b.{n}.k.*", "b.{n}.mlp.*"], (1, 1, 4)),
                    rename("last.*", "end.*", swap_halves=True)))
    ours = table.to_ours({"a.3.qkv.weight": torch.arange(6.0)[:, None], "last.bias": torch.arange(4.0)})
    assert ours["b.3.q.weight"].flatten().tolist() == [0]
    assert ours["b.3.mlp.weight"].flatten().tolist() == [2, 3, 4, 5]
    assert ours["end.bias"].tolist() == [2, 3, 0, 1]


def test_published_configuration_is_found_from_shapes(tmp_path: Path):
    (described,) = inspect_files(write_sparse(tmp_path / "x.safetensors", real_keys("flux1-dev")))["components"]
    assert {key: described["config"][key] for key in PUBLISHED_DIT} == PUBLISHED_DIT
    (described,) = inspect_files(write_sparse(tmp_path / "y.safetensors", real_keys("flux-clip_l")))["components"]
    assert described["config"]["eos_token_id"] == 49407
    assert described["config"]["num_attention_heads"] == 12


def test_family_constants_reach_the_autoencoder(tmp_path: Path):
    (described,) = inspect_files(write_sparse(tmp_path / "x.safetensors", real_keys("flux-ae")))["components"]
    constants = {component.name: component.constants for component in get_family("flux").components}["vae"]
    assert {key: described["config"][key] for key in constants} == dict(constants)


INSPECT = "from diffsynth.models.inspection import inspect_files; import sys; inspect_files(sys.argv[1])"


def processor_seconds(script: str, *words: str) -> float:
    before = os.times()
    subprocess.run([sys.executable, "-c", script, *words], check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_inspecting_24_gigabytes_costs_less_than_two_seconds(tmp_path: Path):
    path = write_sparse(tmp_path / "flux1-dev.safetensors", real_keys("flux1-dev"))
    assert path.stat().st_size > 23.8e9
    # on a machine that is busy with other tests everything is slower; importing torch shows by how much
    limit = max(2.0, processor_seconds("import torch") + 1.0)
    assert min(processor_seconds(INSPECT, str(path)) for _ in range(2)) < limit


def test_inspecting_imports_no_network_classes(tmp_path: Path):
    path = write_sparse(tmp_path / "flux1-dev.safetensors", real_keys("flux1-dev"))
    processor_seconds(INSPECT + "; assert not {'diffusers', 'transformers'} & set(sys.modules)", str(path))
