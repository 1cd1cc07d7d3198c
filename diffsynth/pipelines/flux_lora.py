"""FLUX.1's layer names in LoRA files: the authors' (kohya and ComfyUI write these) and DiffSynth-Studio's own.

Source: https://github.com/black-forest-labs/flux (``Flux``) and https://github.com/modelscope/DiffSynth-Studio
(``FluxDiT``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..models.keymap import KeyMap, Rule, rename, split

_DOUBLE = "transformer_blocks.{i}"
_SINGLE = "single_transformer_blocks.{i}"
_IMAGE_QKV = tuple(f"{_DOUBLE}.attn.{name}" for name in ("to_q", "to_k", "to_v"))
_TEXT_QKV = tuple(f"{_DOUBLE}.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj"))
_SINGLE_QKV_MLP = (*(f"{_SINGLE}.attn.{name}" for name in ("to_q", "to_k", "to_v")), f"{_SINGLE}.proj_mlp")
# the feed-forward width of FLUX.1 is four times the attention width
_QKV_MLP_ROWS = (1, 1, 1, 4)

_ORIGINAL_BLOCKS: tuple[Rule, ...] = (
    rename("img_in", "x_embedder"),
    rename("txt_in", "context_embedder"),
    rename("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    rename("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    rename("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    rename("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    rename("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    rename("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
    rename("double_blocks.{i}.img_mod.lin", f"{_DOUBLE}.norm1.linear"),
    rename("double_blocks.{i}.txt_mod.lin", f"{_DOUBLE}.norm1_context.linear"),
    split("double_blocks.{i}.img_attn.qkv", _IMAGE_QKV),
    split("double_blocks.{i}.txt_attn.qkv", _TEXT_QKV),
    rename("double_blocks.{i}.img_attn.proj", f"{_DOUBLE}.attn.to_out.0"),
    rename("double_blocks.{i}.txt_attn.proj", f"{_DOUBLE}.attn.to_add_out"),
    rename("double_blocks.{i}.img_mlp.0", f"{_DOUBLE}.ff.net.0.proj"),
    rename("double_blocks.{i}.img_mlp.2", f"{_DOUBLE}.ff.net.2"),
    rename("double_blocks.{i}.txt_mlp.0", f"{_DOUBLE}.ff_context.net.0.proj"),
    rename("double_blocks.{i}.txt_mlp.2", f"{_DOUBLE}.ff_context.net.2"),
    split("single_blocks.{i}.linear1", _SINGLE_QKV_MLP, _QKV_MLP_ROWS),
    rename("single_blocks.{i}.linear2", f"{_SINGLE}.proj_out"),
    rename("single_blocks.{i}.modulation.lin", f"{_SINGLE}.norm.linear"),
)
_ORIGINAL_FINAL: tuple[Rule, ...] = (
    rename("final_layer.adaLN_modulation.1", "norm_out.linear", swap_halves=True),
    rename("final_layer.linear", "proj_out"),
)


def flux_original_modules() -> KeyMap:
    """Module names of the authors' release -> ours."""
    return KeyMap(_ORIGINAL_BLOCKS + _ORIGINAL_FINAL)


def flux_kohya_modules() -> KeyMap:
    """The original names that kohya's trainers use: all but the last two layers."""
    return KeyMap(_ORIGINAL_BLOCKS)


def flux_diffsynth_modules() -> KeyMap:
    """Module names of DiffSynth-Studio's own transformer class -> ours."""
    return KeyMap((
        rename("x_embedder", "x_embedder"),
        rename("context_embedder", "context_embedder"),
        rename("time_embedder.timestep_embedder.0", "time_text_embed.timestep_embedder.linear_1"),
        rename("time_embedder.timestep_embedder.2", "time_text_embed.timestep_embedder.linear_2"),
        rename("pooled_text_embedder.0", "time_text_embed.text_embedder.linear_1"),
        rename("pooled_text_embedder.2", "time_text_embed.text_embedder.linear_2"),
        rename("guidance_embedder.timestep_embedder.0", "time_text_embed.guidance_embedder.linear_1"),
        rename("guidance_embedder.timestep_embedder.2", "time_text_embed.guidance_embedder.linear_2"),
        rename("blocks.{i}.norm1_a.linear", f"{_DOUBLE}.norm1.linear"),
        rename("blocks.{i}.norm1_b.linear", f"{_DOUBLE}.norm1_context.linear"),
        split("blocks.{i}.attn.a_to_qkv", _IMAGE_QKV),
        split("blocks.{i}.attn.b_to_qkv", _TEXT_QKV),
        rename("blocks.{i}.attn.a_to_out", f"{_DOUBLE}.attn.to_out.0"),
        rename("blocks.{i}.attn.b_to_out", f"{_DOUBLE}.attn.to_add_out"),
        rename("blocks.{i}.ff_a.0", f"{_DOUBLE}.ff.net.0.proj"),
        rename("blocks.{i}.ff_a.2", f"{_DOUBLE}.ff.net.2"),
        rename("blocks.{i}.ff_b.0", f"{_DOUBLE}.ff_context.net.0.proj"),
        rename("blocks.{i}.ff_b.2", f"{_DOUBLE}.ff_context.net.2"),
        split("single_blocks.{i}.to_qkv_mlp", _SINGLE_QKV_MLP, _QKV_MLP_ROWS),
        rename("single_blocks.{i}.proj_out", f"{_SINGLE}.proj_out"),
        rename("single_blocks.{i}.norm.linear", f"{_SINGLE}.norm.linear"),
        # rows in the original order, unlike ours
        rename("final_norm_out.linear", "norm_out.linear", swap_halves=True),
        rename("final_proj_out", "proj_out"),
    ))


FLUX_LORA_KEY_MAPS: Mapping[str, Callable[[], KeyMap]] = {
    "original": flux_original_modules,
    "kohya": flux_kohya_modules,
    "diffsynth": flux_diffsynth_modules,
}
FLUX_LORA_ALIASES: Mapping[str, tuple[str, ...]] = {}
"""Empty: every older layer name (``a_to_qkv``, ``ff_a.0``, ...) stands in the ``diffsynth`` table."""
