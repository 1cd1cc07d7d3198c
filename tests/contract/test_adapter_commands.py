"""Promise 1: files that are converted, merged, extracted, resized and averaged change the model as they should."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffsynth.adapters.combine import resize_states, sum_states
from diffsynth.adapters.files import LoraFile, change_difference, load_lora_file, save_lora
from diffsynth.adapters.formats import FORMATS, file_metadata, to_tensors
from diffsynth.adapters.lora import apply_lora
from diffsynth.adapters.merge import Merge
from diffsynth.adapters.names import family_names
from diffsynth.adapters.reading import from_tensors
from diffsynth.adapters.state import LoraState
from diffsynth.core.errors import UserError
from diffsynth.models.loading import load_component, save_component
from diffsynth.trainers.run import load_pipeline_class

from .lora_states import RANK, command, named_everywhere, random_layer, random_state, same
from .tiny import FamilyAtWork

FEW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


class Denoiser:
    """The denoiser of a tiny family; not to be changed."""

    def __init__(self, family: FamilyAtWork) -> None:
        pipe = family.pipeline()
        self.family = family.family
        self.component, self.network = pipe.denoiser_models[0], pipe.denoiser
        self.path = pipe.component_paths[self.component][0]
        self.spec = next(c.spec for c in family.family.components if c.name == self.component)
        self.shapes = named_everywhere(family, self.component, self.network)

    def states(self, seed: int = 0, **options) -> dict[str, LoraState]:
        return {self.component: random_state(self.shapes, seed=seed, **options)}

    def written(self, path: Path, fmt: str = "diffusers", seed: int = 0, **options) -> Path:
        save_lora(path, self.states(seed), self.family, fmt, **options)
        return path

    def copy(self) -> torch.nn.Module:
        network = type(self.network).from_config(self.network.config)
        network.load_state_dict(self.network.state_dict())
        return network


@pytest.fixture(scope="session")
def denoiser(family: FamilyAtWork) -> Denoiser:
    return Denoiser(family)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# ---- convert


def test_every_format_becomes_every_other_and_comes_back(denoiser, tmp_path):
    states = denoiser.states()
    for fmt in FORMATS:
        denoiser.written(tmp_path / f"{fmt}.safetensors", fmt, base="the base", options={"learning_rate": 1e-4})
    for first, second in itertools.product(FORMATS, FORMATS):
        there, back = tmp_path / f"{first}-{second}.safetensors", tmp_path / f"{first}-{second}-back.safetensors"
        command("convert", "lora", tmp_path / f"{first}.safetensors", there, "--format", second)
        command("convert", "lora", there, back, "--format", first)
        same(states, load_lora_file(there, denoiser.family))
        same(states, load_lora_file(back, denoiser.family))
        expected = load_file(tmp_path / f"{second}.safetensors")
        assert load_file(there).keys() == expected.keys()
        if first != "diffsynth":  # the strength is still a number of its own
            assert all(torch.equal(tensor, expected[key]) for key, tensor in load_file(there).items())
            assert metadata_of(there)["alpha"] == "10"
        assert metadata_of(there)["base"] == "the base"
        assert json.loads(metadata_of(there)["options"]) == {"learning_rate": 1e-4}
        assert f"converted from {first}.safetensors ({first})" in metadata_of(back)["history"]


@FEW
@given(data=st.data())
def test_any_lora_keeps_its_change_in_any_format(denoiser, data):
    """Any subset of layers, ranks and alphas, rsLoRA or not, DoRA in the format that has it."""
    fmt = data.draw(st.sampled_from(FORMATS))
    names = data.draw(st.lists(st.sampled_from(sorted(denoiser.shapes)), min_size=1, unique=True))
    dora = fmt == "diffusers" and data.draw(st.booleans())
    layers = {}
    for name in names:
        rank, alpha = data.draw(st.integers(1, 5)), data.draw(st.floats(0.125, 64, width=32))
        layer = random_layer(denoiser.shapes[name], rank, alpha, data.draw(st.integers(0, 99)))
        layers[name] = replace(layer, use_rslora=data.draw(st.booleans()),
                               dora_scale=layer.up.norm(dim=1) if dora else None)
    states = {denoiser.component: LoraState(layers)}
    tensors = to_tensors(states, denoiser.family, fmt)
    metadata = file_metadata(states, tensors, denoiser.family, fmt)
    read = from_tensors(tensors, tensors.__getitem__, metadata, denoiser.family)
    assert change_difference(states, read.states) <= 1e-6
    assert read.format(denoiser.family) == fmt
    for name, layer in layers.items():
        found = read.states[denoiser.component].layers[name]
        assert (found.dora_scale is None) == (layer.dora_scale is None)
        if fmt == "diffusers":
            assert math.isclose(found.scale, layer.scale, rel_tol=1e-12)


def test_narrow_numbers_stay_narrow_where_nothing_is_lost(denoiser, tmp_path):
    denoiser.written(tmp_path / "half.safetensors", dtype=torch.bfloat16)
    half = load_lora_file(tmp_path / "half.safetensors", denoiser.family)
    for fmt, dtype in (("kohya", torch.bfloat16), ("diffsynth", torch.float32)):  # alpha is folded in: 2.5 would round
        command("convert", "lora", tmp_path / "half.safetensors", tmp_path / f"{fmt}.safetensors", "--format", fmt)
        factors = {key: tensor for key, tensor in load_file(tmp_path / f"{fmt}.safetensors").items() if "lora" in key}
        assert {tensor.dtype for key, tensor in factors.items() if not key.endswith("alpha")} == {dtype}
        same(half, load_lora_file(tmp_path / f"{fmt}.safetensors", denoiser.family))
    command("convert", "lora", tmp_path / "kohya.safetensors", tmp_path / "asked.safetensors", "--format", "comfyui",
            "--dtype", "float16")
    assert {tensor.dtype for key, tensor in load_file(tmp_path / "asked.safetensors").items()
            if not key.endswith("alpha")} == {torch.float16}


def test_metadata_of_other_programs_stays_unless_it_would_be_wrong(denoiser, tmp_path):
    tensors = to_tensors(denoiser.states(), denoiser.family, "kohya")
    save_file(tensors, tmp_path / "in.safetensors", {
        "ss_network_dim": "4", "ss_learning_rate": "1e-4", "sshs_model_hash": "abc", "modelspec.title": "Dog"})
    command("convert", "lora", tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--format", "comfyui")
    metadata = metadata_of(tmp_path / "out.safetensors")
    assert (metadata["ss_learning_rate"], metadata["modelspec.title"]) == ("1e-4", "Dog")
    assert not {"sshs_model_hash", "ss_network_dim"} & metadata.keys()


def refused_inputs(denoiser: Denoiser) -> dict[str, tuple[dict[str, torch.Tensor], str, str]]:
    """What is wrong -> tensors, format asked for, message."""
    names = family_names(denoiser.family).components
    name, shape = next(iter(denoiser.shapes.items()))
    plain = to_tensors({denoiser.component: LoraState({name: random_layer(shape, 2, 2.0)})}, denoiser.family, "kohya")
    module = next(iter(plain)).split(".")[0]
    prefix = names[denoiser.component].diffusers
    dora = {f"{prefix}{name}.lora_A.weight": torch.ones(2, shape[1]), f"{prefix}{name}.lora_B.weight":
            torch.ones(shape[0], 2), f"{prefix}{name}.lora_magnitude_vector": torch.ones(shape[0])}
    cases = {
        "dora": (dora, "kohya", "is a DoRA, which the kohya format cannot hold; use --format diffusers"),
        "lokr": ({f"{module}.lokr_w1": torch.ones(2, 2)}, "diffusers", "another kind than LoRA"),
        "loha": (plain | {f"{module}.hada_w1_a": torch.ones(2, 2)}, "diffusers", "another kind"),
        "convolution": ({key: tensor[:, :, None, None] if tensor.ndim else tensor for key, tensor in plain.items()},
                        "diffusers", "factors of a convolution"),
        "unknown layer": (plain | {"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, "diffusers", "layers match"),
    }
    for encoder, known in names.items():
        if not known.is_denoiser and known.original is not None:
            ours = known.original.rules[0].ours[0].replace("{i}", "0")
            tensors = to_tensors({encoder: LoraState({ours: random_layer((8, 8), 2, 2.0)})}, denoiser.family, "kohya")
            cases[encoder] = (tensors, "diffsynth", f"no name in the diffsynth format, for example {encoder}: ")
    return cases


def test_what_a_format_cannot_represent_is_refused_by_name(denoiser, tmp_path):
    cases = refused_inputs(denoiser)
    for what, (tensors, fmt, message) in cases.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / f"{what}.safetensors")
        with pytest.raises(UserError, match=message) as caught:
            command("convert", "lora", tmp_path / f"{what}.safetensors", tmp_path / "out.safetensors", "--format", fmt)
        assert "\n" not in str(caught.value)
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(cases)


def test_inputs_and_existing_files_are_not_overwritten(denoiser, tmp_path):
    source, other = denoiser.written(tmp_path / "in.safetensors"), denoiser.written(tmp_path / "x.safetensors", seed=9)
    before = source.read_bytes(), other.read_bytes()
    for output, more, message in (
        (source, ("--overwrite",), "also an input"), (other, (), "exists already"),
        (tmp_path, (), "must end in"), (tmp_path / "x.png", (), "must end in"),
    ):
        with pytest.raises(UserError, match=message):
            command("convert", "lora", source, output, "--format", "kohya", *more)
    assert (source.read_bytes(), other.read_bytes()) == before
    command("convert", "lora", source, other, "--format", "kohya", "--overwrite")
    same(denoiser.states(), load_lora_file(other, denoiser.family))


# ---- merge


def merged_files(denoiser: Denoiser, folder: Path) -> str:
    denoiser.written(folder / "a.safetensors", "kohya", seed=1)
    denoiser.written(folder / "b.safetensors", "diffusers", seed=2)
    return f"{folder / 'a.safetensors'}:0.5,{folder / 'b.safetensors'}:-1.5"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_merged_weights_are_the_fused_ones(denoiser, tmp_path, layout, dtype):
    base = save_component(denoiser.network, tmp_path / "base.safetensors", denoiser.spec, layout, dtype)
    command("lora", "merge", base, tmp_path / "merged.safetensors", "--lora", merged_files(denoiser, tmp_path))
    fused = load_component(base, torch_dtype=dtype)
    for name, strength in (("a", 0.5), ("b", -1.5)):
        state = load_lora_file(tmp_path / f"{name}.safetensors", denoiser.family)[denoiser.component]
        apply_lora(fused, state, strength)
    merged = load_component(tmp_path / "merged.safetensors", torch_dtype=dtype)
    expected, plain = fused.state_dict(), load_component(base, torch_dtype=dtype).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in merged.state_dict().items())
    changed = {name for name, weight in merged.state_dict().items() if not torch.equal(weight, plain[name])}
    assert changed == {f"{name}.weight" for name in denoiser.shapes}
    before, after = ({key: (tensor.shape, tensor.dtype) for key, tensor in load_file(path).items()}
                     for path in (base, tmp_path / "merged.safetensors"))
    assert before == after
    assert json.loads(metadata_of(tmp_path / "merged.safetensors")["merged_loras"]) == [
        {"file": "a.safetensors", "strength": 0.5}, {"file": "b.safetensors", "strength": -1.5}]


def test_picture_of_a_merged_model_is_that_of_the_fused_lora(family, denoiser, tmp_path):
    lora = denoiser.written(tmp_path / "lora.safetensors")
    command("lora", "merge", denoiser.path, tmp_path / denoiser.path.name, "--lora", lora)
    pictures = []
    for path in (denoiser.path, tmp_path / denoiser.path.name):
        files = [str(path) if Path(file) == denoiser.path else file for file in family.model_files]
        pipe = load_pipeline_class(family.family).from_pretrained(torch.float32, "cpu", files)
        if path == denoiser.path:
            pictures.append(pipe(prompt="a dog", height=32, width=32, num_inference_steps=2, seed=0).tobytes())
            pipe.load_lora(pipe.denoiser, lora)
        pictures.append(pipe(prompt="a dog", height=32, width=32, num_inference_steps=2, seed=0).tobytes())
    plain, fused, merged = pictures
    assert merged == fused
    assert fused != plain


def test_dora_is_merged_as_it_is_fused(denoiser, tmp_path):
    layers = {name: replace(layer, dora_scale=1.1 * denoiser.network.get_submodule(name).weight.detach().norm(dim=1))
              for name, layer in denoiser.states()[denoiser.component].layers.items()}
    save_lora(tmp_path / "dora.safetensors", {denoiser.component: LoraState(layers)}, denoiser.family, "diffusers")
    command("lora", "merge", denoiser.path, tmp_path / "merged.safetensors", "--lora", tmp_path / "dora.safetensors")
    fused = denoiser.copy()
    apply_lora(fused, LoraState(layers))
    merged = load_component(tmp_path / "merged.safetensors").state_dict()
    assert all(torch.equal(merged[name], weight) for name, weight in fused.state_dict().items())


def test_merged_folder_is_in_shards_and_can_be_merged_again(denoiser, tmp_path):
    lora = denoiser.written(tmp_path / "lora.safetensors")
    command("lora", "merge", denoiser.path, tmp_path / "once", "--lora", lora, "--max_shard_size", "2MB",
            "--dtype", "bfloat16")
    shards = sorted((tmp_path / "once").glob("*-of-*.safetensors"))
    index = json.loads(next((tmp_path / "once").glob("*.index.json")).read_text(encoding="utf-8"))
    assert len(shards) > 1
    sizes = [sum(tensor.numel() * 2 for tensor in load_file(shard).values()) for shard in shards]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert max(sizes) <= 2e6
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    command("lora", "merge", tmp_path / "once", tmp_path / "whole.safetensors", "--lora", f"{lora}:-1",
            "--dtype", "float32")
    back, plain = load_component(tmp_path / "whole.safetensors").state_dict(), denoiser.network.state_dict()
    assert all(float((back[name] - weight).norm()) <= 0.05 * float(weight.norm()) for name, weight in plain.items())
    with pytest.raises(UserError, match="exists already; choose a new folder"):
        command("lora", "merge", denoiser.path, tmp_path / "once", "--lora", lora)


def test_a_merge_that_fails_leaves_nothing(denoiser, tmp_path, monkeypatch):
    lora = denoiser.written(tmp_path / "lora.safetensors")
    weight, seen = Merge.weight, []

    def breaks_down(self, key):
        seen.append(key)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return weight(self, key)

    monkeypatch.setattr(Merge, "weight", breaks_down)
    for output in ("merged.safetensors", "merged"):
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            command("lora", "merge", denoiser.path, tmp_path / output, "--lora", lora, "--max_shard_size", "1MB")
    monkeypatch.setattr(Merge, "weight", lambda self, key: weight(self, key) * 1)
    count = itertools.count()
    monkeypatch.setattr("diffsynth.adapters.merge._checksum", lambda tensor: next(count))
    with pytest.raises(RuntimeError, match="reads back differently"):
        command("lora", "merge", denoiser.path, tmp_path / "merged.safetensors", "--lora", lora)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_float8_models_and_wrong_networks_are_refused(denoiser, tmp_path):
    lora = denoiser.written(tmp_path / "lora.safetensors")
    tensors = {key: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor
               for key, tensor in load_file(denoiser.path).items()}
    save_file(tensors, tmp_path / "fp8.safetensors")
    with pytest.raises(UserError, match="keeps its weights in float8.*--dtype bfloat16"):
        command("lora", "merge", tmp_path / "fp8.safetensors", tmp_path / "m.safetensors", "--lora", lora)
    words = ("lora", "merge", tmp_path / "fp8.safetensors", tmp_path / "m.safetensors", "--lora", lora)
    command(*words, "--dtype", "bfloat16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "m.safetensors").values()} == {torch.bfloat16}
    name = next(name for name in denoiser.shapes if ".0." in name)
    rows, columns = denoiser.shapes[name]
    for wrong, message in (({name: (rows, columns + 2)}, "and in .* it has"),
                           ({name.replace(".0.", ".77.", 1): (rows, columns)}, "does not exist in")):
        path = tmp_path / "wrong.safetensors"
        save_lora(path, {denoiser.component: random_state(wrong)}, denoiser.family, "diffusers")
        with pytest.raises(UserError, match=message):
            command("lora", "merge", denoiser.path, tmp_path / "x.safetensors", "--lora", path)
    with pytest.raises(UserError, match="none of --components vae"):
        command("lora", "merge", denoiser.path, tmp_path / "x.safetensors", "--lora", lora, "--components", "vae")
    assert not (tmp_path / "x.safetensors").exists()


def test_networks_of_a_lora_are_left_out_only_on_purpose(denoiser, tmp_path):
    for name, known in family_names(denoiser.family).components.items():
        if not known.is_denoiser and known.original is not None:
            ours = known.original.rules[0].ours[0].replace("{i}", "0")
            states = denoiser.states() | {name: LoraState({ours: random_layer((8, 8), 2, 2.0)})}
            save_lora(tmp_path / f"{name}.safetensors", states, denoiser.family, "diffusers")
            words = ("lora", "merge", denoiser.path, tmp_path / f"{name}-merged.safetensors", "--lora",
                     tmp_path / f"{name}.safetensors")
            with pytest.raises(UserError, match=f"and no {name}, which the LoRA changes"):
                command(*words)
            command(*words, "--components", denoiser.component, "--family", denoiser.family.name)
            assert (tmp_path / f"{name}-merged.safetensors").exists()
    with pytest.raises(UserError, match="there is no model family 'nothing'"):
        command("lora", "merge", denoiser.path, tmp_path / "x.safetensors", "--lora",
                denoiser.written(tmp_path / "a.safetensors"), "--family", "nothing")


# ---- extract, resize, average


@pytest.mark.parametrize("fmt", FORMATS)
def test_lora_extracted_from_a_merged_model_is_the_lora(denoiser, tmp_path, fmt):
    """Three layers of rank 2 in one weight of the file have rank 6 there."""
    full = denoiser.written(tmp_path / "full.safetensors", fmt)
    command("lora", "resize", full, tmp_path / "lora.safetensors", "--rank", "2")
    command("lora", "merge", denoiser.path, tmp_path / "merged.safetensors", "--lora", tmp_path / "lora.safetensors")
    diffusers_names = save_component(load_component(tmp_path / "merged.safetensors"), tmp_path / "again.safetensors",
                                     denoiser.spec, "diffusers")
    command("lora", "extract", denoiser.path, diffusers_names, tmp_path / "found.safetensors", "--rank", "8",
            "--format", fmt, "--device", "cpu")
    expected = load_lora_file(tmp_path / "lora.safetensors", denoiser.family)
    found = load_lora_file(tmp_path / "found.safetensors", denoiser.family)
    assert found[denoiser.component].layers.keys() == expected[denoiser.component].layers.keys()
    assert change_difference(expected, found) <= 1e-5


def test_changes_that_no_lora_can_hold_are_counted_and_refused(denoiser, tmp_path):
    tuned = denoiser.copy()
    name = next(iter(denoiser.shapes))
    with torch.no_grad():
        tuned.get_submodule(name).weight[0] += 1
        tuned.get_submodule(name).bias += 1
    save_component(tuned, tmp_path / "tuned.safetensors", denoiser.spec)
    words = ("lora", "extract", denoiser.path, tmp_path / "tuned.safetensors", tmp_path / "lora.safetensors",
             "--rank", "1")
    with pytest.raises(UserError, match=f"1 changed weights are no linear layers, for example .*{name}.bias"):
        command(*words)
    assert not (tmp_path / "lora.safetensors").exists()
    command(*words, "--ignore_other_changes")
    layers = load_lora_file(tmp_path / "lora.safetensors", denoiser.family)[denoiser.component].layers
    assert layers.keys() == {name}
    expected = torch.zeros(denoiser.shapes[name])
    expected[0] = 1
    torch.testing.assert_close(layers[name].delta(), expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="nothing to extract"):
        command("lora", "extract", denoiser.path, denoiser.path, tmp_path / "none.safetensors", "--rank", "1")


@FEW
@given(rank=st.integers(1, 3), seed=st.integers(0, 99), fmt=st.sampled_from(FORMATS))
def test_resized_lora_is_the_nearest_of_its_rank(denoiser, rank, seed, fmt):
    states = denoiser.states(seed)
    resized, kept = resize_states(states, denoiser.family, fmt, rank, None, Path("x"))
    for name, layer in states[denoiser.component].layers.items():
        found = resized[denoiser.component].layers[name]
        values = torch.linalg.svdvals(layer.delta().double())
        assert found.rank == rank
        error = float((layer.delta().double() - found.delta().double()).square().sum())
        assert error == pytest.approx(float(values[rank:].square().sum()), rel=1e-3)
        assert kept[name].share == pytest.approx(float(values[:rank].square().sum() / values.square().sum()), rel=1e-5)


@pytest.mark.parametrize("fmt", FORMATS)
def test_resize_to_a_share_keeps_at_least_that(denoiser, tmp_path, fmt):
    full = denoiser.states(rank=8)
    save_lora(tmp_path / "in.safetensors", full, denoiser.family, fmt)
    command("lora", "resize", tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--keep", "0.8")
    found = load_lora_file(tmp_path / "out.safetensors", denoiser.family)
    ranks = {name: layer.rank for name, layer in found[denoiser.component].layers.items()}
    assert all(1 <= rank < 8 for rank in ranks.values())
    assert 1 - change_difference(full, found) ** 2 >= 0.8
    command("lora", "resize", tmp_path / "in.safetensors", tmp_path / "all.safetensors", "--keep", "1")
    assert change_difference(full, load_lora_file(tmp_path / "all.safetensors", denoiser.family)) <= 1e-6
    for words, message in ((("--rank", "8"), "would change nothing"), ((), "either --rank or --keep"),
                           (("--rank", "2", "--keep", "0.5"), "either --rank or --keep")):
        with pytest.raises(UserError, match=message):
            command("lora", "resize", tmp_path / "in.safetensors", tmp_path / "no.safetensors", *words)


@FEW
@given(weights=st.lists(st.floats(-2, 2), min_size=1, max_size=3), data=st.data())
def test_weighted_sum_is_exact(denoiser, weights, data):
    files, expected = [], {}
    for seed, weight in enumerate(weights):
        names = data.draw(st.lists(st.sampled_from(sorted(denoiser.shapes)), min_size=1, max_size=4, unique=True))
        state = random_state({name: denoiser.shapes[name] for name in names}, seed=seed * 50)
        file = LoraFile(Path("x"), denoiser.family, "diffusers", {denoiser.component: state}, {}, 1, 1)
        files.append((file, weight))
        for name, layer in state.layers.items():
            expected[name] = expected.get(name, 0) + weight * layer.delta().double()
    found = sum_states(files)[denoiser.component].layers
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name].delta().double(), change, atol=1e-6, rtol=1e-6)


def test_average_of_files_is_written_and_can_be_resized(denoiser, tmp_path):
    entries = merged_files(denoiser, tmp_path)
    command("lora", "average", tmp_path / "sum.safetensors", "--lora", entries)
    found = load_lora_file(tmp_path / "sum.safetensors", denoiser.family)[denoiser.component]
    first, second = (denoiser.states(seed)[denoiser.component].layers for seed in (1, 2))
    for name, layer in found.layers.items():
        expected = 0.5 * first[name].delta() - 1.5 * second[name].delta()
        torch.testing.assert_close(layer.delta(), expected, atol=1e-6, rtol=0)
    assert {layer.rank for layer in found.layers.values()} == {2 * RANK}
    command("lora", "average", tmp_path / "small.safetensors", "--lora", entries, "--rank", RANK, "--format", "kohya")
    assert metadata_of(tmp_path / "small.safetensors")["lora_format"] == "kohya"
    small = load_lora_file(tmp_path / "small.safetensors", denoiser.family)[denoiser.component]
    assert {layer.rank for layer in small.layers.values()} == {RANK}


def test_average_of_different_bases_or_of_dora_is_refused(denoiser, tmp_path):
    a = denoiser.written(tmp_path / "a.safetensors", base="one")
    b = denoiser.written(tmp_path / "b.safetensors", base="two")
    with pytest.raises(UserError, match="name different base models.*'one'.*'two'"):
        command("lora", "average", tmp_path / "c.safetensors", "--lora", f"{a},{b}")
    command("lora", "average", tmp_path / "c.safetensors", "--lora", f"{a},{b}", "--ignore_base")
    layers = {name: replace(layer, dora_scale=torch.ones(len(layer.up)))
              for name, layer in denoiser.states()[denoiser.component].layers.items()}
    save_lora(tmp_path / "dora.safetensors", {denoiser.component: LoraState(layers)}, denoiser.family, "diffusers")
    for words in (("average", tmp_path / "d.safetensors", "--lora", f"{a},{tmp_path / 'dora.safetensors'}"),
                  ("resize", tmp_path / "dora.safetensors", tmp_path / "d.safetensors", "--rank", "1")):
        with pytest.raises(UserError, match="is a DoRA"):
            command("lora", *words)
    assert not (tmp_path / "d.safetensors").exists()
