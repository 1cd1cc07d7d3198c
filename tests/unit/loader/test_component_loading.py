"""From any file to a network: recognition, configuration, completeness, memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weight_files import CLIP_L, FLUX_AE, FLUX_DIT, GOLDEN, T5XXL, write_weights

from diffsynth.core.errors import UserError
from diffsynth.core.loader import ModelConfig
from diffsynth.models.inspection import inspect_files
from diffsynth.models.loading import load_component, load_components, module_config
from diffsynth.models.registry import get_family

FLUX_FILES = [FLUX_DIT, FLUX_AE, CLIP_L, T5XXL]


def assert_same(first: torch.nn.Module, second: torch.nn.Module) -> None:
    assert type(first) is type(second)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden networks as diffusers and transformers themselves save a complete pipeline."""
    folder = tmp_path_factory.mktemp("flux")
    places = {"transformer": FLUX_DIT, "vae": FLUX_AE, "text_encoder": CLIP_L, "text_encoder_2": T5XXL}
    for name, path in places.items():
        sharded = {"max_shard_size": "1MB"} if name in ("transformer", "text_encoder_2") else {}
        load_component(path).save_pretrained(folder / name, **sharded)
    index = {name: ["diffusers", "AnyClass"] for name in places}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}", encoding="utf-8")
    return folder


def test_complete_diffusers_folder_equals_the_original_files(diffusers_folder: Path):
    family = get_family("flux")
    ours, theirs = load_components(FLUX_FILES, family), load_components([diffusers_folder], family)
    assert list(ours) == list(theirs) == ["dit", "vae", "text_encoder", "text_encoder_2"]
    for name, component in ours.items():
        assert_same(component.module, theirs[name].module)
        assert component.module._diffsynth_source.fingerprint == component.fingerprint
    assert len(theirs["dit"].paths) > 1


@pytest.mark.parametrize("name", ["transformer", "text_encoder_2", "text_encoder", "vae"])
def test_every_way_to_name_a_folder(diffusers_folder: Path, name: str):
    expected = load_component(diffusers_folder / name)
    shards = sorted((diffusers_folder / name).glob("*.safetensors"))
    for way in [shards[0], shards, ModelConfig(shards), ModelConfig(str(diffusers_folder / name))]:
        assert_same(expected, load_component(way))
    for index in (diffusers_folder / name).glob("*.index.json"):
        assert_same(expected, load_component(index))


def test_missing_shard_is_named(diffusers_folder: Path, tmp_path: Path):
    folder = shutil.copytree(diffusers_folder / "transformer", tmp_path / "transformer")
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.unlink()
    for way in [folder, sorted(folder.glob("*.safetensors"))[0]]:
        with pytest.raises(UserError, match=shard.name):
            load_component(way)


def test_index_that_leaves_its_folder_is_refused(tmp_path: Path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret"}}), "utf-8")
    with pytest.raises(UserError, match="outside"):
        load_component(tmp_path)


@pytest.mark.parametrize(
    ("path", "prefix"),
    [(FLUX_DIT, "model.diffusion_model."), (FLUX_AE, "first_stage_model."), (FLUX_AE, "vae."),
     (CLIP_L, "text_encoders.clip_l.transformer."), (T5XXL, "text_encoders.t5xxl.transformer.")],
)
def test_prefixes_of_bundles_are_read(tmp_path: Path, path: Path, prefix: str):
    bundled = write_weights(tmp_path / "x.safetensors", {prefix + k: v for k, v in load_file(path).items()})
    assert_same(load_component(path), load_component(bundled))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    prefixes = ["model.diffusion_model.", "vae.", "text_encoders.clip_l.transformer.",
                "text_encoders.t5xxl.transformer."]
    tensors = {prefix + key: value for prefix, path in zip(prefixes, FLUX_FILES, strict=True)
               for key, value in load_file(path).items()}
    return write_weights(tmp_path / "bundle.safetensors", tensors)


def test_one_file_may_hold_everything(bundle: Path):
    for name, component in load_components([bundle], get_family("flux")).items():
        assert_same(component.module, load_component(bundle, name))
    assert [part["name"] for part in inspect_files(bundle)["components"]] == [
        "dit", "vae", "text_encoder", "text_encoder_2"]
    with pytest.raises(UserError, match="several networks; it holds dit, vae, text_encoder, text_encoder_2"):
        load_component(bundle)
    with pytest.raises(UserError, match="no networks called 'unet'"):
        load_component(bundle, "unet")


def test_clip_without_its_text_model_level(tmp_path: Path):
    flat = {key.removeprefix("text_model."): value for key, value in load_file(CLIP_L).items()}
    assert_same(load_component(CLIP_L), load_component(write_weights(tmp_path / "x.safetensors", flat)))


@pytest.mark.parametrize("left_out", ["shared.weight", "encoder.embed_tokens.weight"])
def test_t5_with_either_embedding(tmp_path: Path, left_out: str):
    tensors = {key: value for key, value in load_file(T5XXL).items() if key != left_out}
    module = load_component(write_weights(tmp_path / "x.safetensors", tensors))
    assert_same(load_component(T5XXL), module)
    assert module.shared.weight is module.encoder.embed_tokens.weight


def test_umt5_and_full_t5_are_not_the_t5_encoder(tmp_path: Path):
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    umt5 = {**load_file(T5XXL), bias.format(1): torch.zeros(32, 2, dtype=torch.float16)}
    full = {**load_file(T5XXL), "decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2)}
    for tensors, says in [(umt5, "umT5"), (full, "only the encoder")]:
        with pytest.raises(UserError, match=says):
            load_component(write_weights(tmp_path / "x.safetensors", tensors))


def test_configuration_in_the_metadata_wins(tmp_path: Path):
    config = {"_class_name": "CLIPTextModel", "num_attention_heads": 4, "eos_token_id": 7}
    save_file(load_file(CLIP_L), tmp_path / "x.safetensors", {"config": json.dumps(config)})
    loaded = load_component(tmp_path / "x.safetensors").config
    assert (loaded.num_attention_heads, loaded.eos_token_id, loaded.hidden_act) == (4, 7, "quick_gelu")


def test_configuration_beside_wins_only_when_it_is_about_this_network(tmp_path: Path):
    shutil.copy(CLIP_L, tmp_path / "model.safetensors")
    beside = tmp_path / "config.json"
    beside.write_text(json.dumps({"architectures": ["CLIPTextModel"], "num_attention_heads": 4}), "utf-8")
    assert load_component(tmp_path).config.num_attention_heads == 4
    beside.write_text(json.dumps({"_class_name": "AutoencoderKL", "num_attention_heads": 4}), "utf-8")
    assert load_component(tmp_path).config.num_attention_heads == 2
    beside.write_text("{", "utf-8")
    with pytest.raises(UserError, match="no JSON"):
        load_component(tmp_path)


def test_configuration_that_contradicts_the_weights_is_named(tmp_path: Path):
    shutil.copy(CLIP_L, tmp_path / "model.safetensors")
    config = {"architectures": ["CLIPTextModel"], "intermediate_size": 300}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(UserError, match=r"needs \(300") as error:
        load_component(tmp_path)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize(("path", "key"), [(FLUX_DIT, "double_blocks.0.img_attn.qkv.weight"),
                                           (FLUX_AE, "decoder.mid.attn_1.q.weight"),
                                           (CLIP_L, "text_model.encoder.layers.1.mlp.fc1.bias"),
                                           (T5XXL, "encoder.final_layer_norm.weight")])
def test_missing_and_unexpected_weights_are_named(tmp_path: Path, path: Path, key: str):
    tensors = load_file(path)
    tensors["surprise"] = tensors.pop(key)
    broken = write_weights(tmp_path / "x.safetensors", tensors)
    with pytest.raises(UserError, match="surprise") as error:
        load_component(broken)
    assert key in str(error.value)
    (described,) = inspect_files(broken)["components"]
    assert described["missing"] == [key]
    assert described["unexpected"] == ["surprise"]


@pytest.mark.parametrize("left_out", range(4))
def test_missing_component_says_which_file_brings_it(left_out: int):
    family = get_family("flux")
    files = [path for number, path in enumerate(FLUX_FILES) if number != left_out]
    component = family.components[left_out]
    with pytest.raises(UserError, match=f"needs {component.name}") as error:
        load_components(files, family)
    assert component.found_in in str(error.value)
    others = {other.name for other in family.components} - {component.name}
    assert set(load_components(files, family, names=others)) == others


def test_only_the_asked_components_are_loaded():
    assert list(load_components(FLUX_FILES, get_family("flux"), names={"vae"})) == ["vae"]
    with pytest.raises(UserError, match="Did you mean 'vae'"):
        load_components(FLUX_FILES, get_family("flux"), names={"vea"})


def test_two_files_for_one_component_are_named(tmp_path: Path):
    copy = Path(shutil.copy(FLUX_AE, tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match=r"vae of flux is both in .*ae\.safetensors and in .*other"):
        load_components([*FLUX_FILES, copy], get_family("flux"))


@pytest.mark.parametrize(
    ("key", "says"),
    [("model.diffusion_model.input_blocks.0.0.weight", "a UNet in the original"),
     ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight", "a UNet in the diffusers"),
     ("transformer.blocks.0.attn.to_q.lora_A.weight", "LoRA"), ("something.else", "1 tensors, for example")],
)
def test_foreign_file_is_named_with_what_it_seems_to_be(tmp_path: Path, key: str, says: str):
    foreign = write_weights(tmp_path / "foreign.safetensors", {key: torch.zeros(2)})
    with pytest.raises(UserError, match=says) as error:
        load_components([*FLUX_FILES, foreign], get_family("flux"))
    assert "foreign.safetensors" in str(error.value)
    with pytest.raises(UserError, match=says):
        load_component(foreign)
    with pytest.raises(UserError, match=says):
        inspect_files(foreign)


def test_autoencoder_of_another_family_is_not_taken(tmp_path: Path):
    tensors = {**load_file(FLUX_AE), "quant_conv.weight": torch.zeros(32, 32, 1, 1)}
    with pytest.raises(UserError, match="Stable Diffusion kind"):
        load_component(write_weights(tmp_path / "x.safetensors", tensors))


def test_missing_path_suggests_a_neighbour():
    with pytest.raises(UserError, match=r"Did you mean 'ae\.safetensors'"):
        load_component(FLUX_AE.with_name("ea.safetensors"))
    with pytest.raises(UserError, match="does not exist"):
        ModelConfig("nowhere/x.safetensors").resolve()
    with pytest.raises(UserError, match="holds no weight files"):
        load_component(GOLDEN.parent / "real_keys")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("path", FLUX_FILES)
def test_weights_arrive_in_the_asked_dtype_or_a_safe_one(path: Path, dtype: torch.dtype):
    module = load_component(path, torch_dtype=dtype)
    unsafe = {FLUX_AE: torch.float32, T5XXL: torch.bfloat16} if dtype == torch.float16 else {}
    assert {value.dtype for value in module.parameters()} == {unsafe.get(path, dtype)}
    for name, buffer in module.named_buffers():
        assert buffer.device.type == "cpu", name
    with torch.no_grad():
        value = load_file(path)
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert value


def test_buffers_that_no_file_holds_have_their_values():
    embeddings = load_component(CLIP_L).embeddings
    assert embeddings.position_ids.tolist() == [list(range(77))]


@pytest.mark.parametrize("heads", [1, 2])
def test_rope_axes_of_other_widths_add_up(tmp_path: Path, heads: int):
    from diffusers import FluxTransformer2DModel

    config = {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32,
              "num_attention_heads": heads, "joint_attention_dim": 8, "pooled_projection_dim": 8,
              "guidance_embeds": False, "axes_dims_rope": (4, 14, 14)}
    path = write_weights(tmp_path / "x.safetensors", FluxTransformer2DModel(**config).state_dict())
    loaded = module_config(load_component(path))
    assert {key: loaded[key] for key in config} == {**config, "axes_dims_rope": [4, 14, 14]}


MEASURE = """
import json, resource, sys, threading, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from diffsynth.models.loading import load_component
from diffusers import FluxTransformer2DModel
load_component(sys.argv[1])  # imports and first allocations

def resident():
    return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()

peak = before = resident()
done = threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, resident())
        time.sleep(0.001)
watcher = threading.Thread(target=watch); watcher.start()
module = load_component(sys.argv[2], torch_dtype=getattr(torch, sys.argv[3]))
done.set(); watcher.join()
peak = max(peak, resident())
size = sum(value.nbytes for value in module.parameters())
print(json.dumps([size, peak - before]))
"""


@pytest.fixture(scope="module")
def half_gigabyte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import FluxTransformer2DModel

    from diffsynth.pipelines.flux_components import flux_key_map

    with torch.device("meta"):
        module = FluxTransformer2DModel(num_layers=2, num_single_layers=3, num_attention_heads=8,
                                        joint_attention_dim=512, guidance_embeds=True)
    tensors = {key: torch.zeros(value.shape) for key, value in module.state_dict().items()}
    path = tmp_path_factory.mktemp("big") / "big.safetensors"
    save_file(flux_key_map().to_original(tensors), path)
    assert path.stat().st_size > 500e6
    return path


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_holds_the_model_once(half_gigabyte: Path, dtype: str):
    command = [sys.executable, "-c", MEASURE, str(FLUX_DIT), str(half_gigabyte), dtype]
    size, growth = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert growth <= 1.15 * size, f"{growth / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
