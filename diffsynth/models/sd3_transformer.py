"""The joint transformer of Stable Diffusion 3 and 3.5 (``SD3Transformer2DModel``) in its two layouts.

Source: github.com/Stability-AI/sd3.5 ``mmditx.py``. The last block's text half only feeds the attention, so that it has
a shorter modulation and nothing after the attention. The original modulates with (shift, scale) at the end of the
network and in that last half, diffusers with (scale, shift).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .keymap import KeyMap, Rule, rename, split
from .spec import ComponentSpec, Layout, Shapes, count_blocks

HEAD_DIM = 64
"""``mmditx.py``: the number of heads is the depth, and the width 64 times the depth."""


def sd3_key_map(config: Mapping[str, Any]) -> KeyMap:
    """Table from the original names to those of ``SD3Transformer2DModel`` for one configuration."""
    last = config["num_layers"] - 1
    rules = [
        rename("x_embedder.proj.*", "pos_embed.proj.*"),
        rename("pos_embed", "pos_embed.pos_embed"),
        rename("context_embedder.*", "context_embedder.*"),
        rename("final_layer.linear.*", "proj_out.*"),
        rename("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", swap_halves=True),
    ]
    for original, ours in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        rules += [rename(f"{original}.mlp.0.*", f"time_text_embed.{ours}.linear_1.*"),
                  rename(f"{original}.mlp.2.*", f"time_text_embed.{ours}.linear_2.*")]
    for block in range(last + 1):
        original, ours = f"joint_blocks.{block}.", f"transformer_blocks.{block}."
        rules += _picture_half(original + "x_block.", ours, config, dual=block in config["dual_attention_layers"])
        rules += _text_half(original + "context_block.", ours, config, is_last=block == last)
    return KeyMap(tuple(rules))


def _picture_half(original: str, ours: str, config: Mapping[str, Any], dual: bool) -> list[Rule]:
    rules = [
        rename(f"{original}adaLN_modulation.1.*", f"{ours}norm1.linear.*"),
        rename(f"{original}mlp.fc1.*", f"{ours}ff.net.0.proj.*"), rename(f"{original}mlp.fc2.*", f"{ours}ff.net.2.*"),
    ]
    for attention in ("attn", "attn2") if dual else ("attn",):
        rules += [
            split(f"{original}{attention}.qkv.*", [f"{ours}{attention}.to_{part}.*" for part in "qkv"]),
            rename(f"{original}{attention}.proj.*", f"{ours}{attention}.to_out.0.*"),
        ]
        if config.get("qk_norm"):
            rules += [rename(f"{original}{attention}.ln_{part}.weight", f"{ours}{attention}.norm_{part}.weight")
                      for part in "qk"]
    return rules


def _text_half(original: str, ours: str, config: Mapping[str, Any], is_last: bool) -> list[Rule]:
    rules = [
        rename(f"{original}adaLN_modulation.1.*", f"{ours}norm1_context.linear.*", swap_halves=is_last),
        split(f"{original}attn.qkv.*", [f"{ours}attn.add_{part}_proj.*" for part in "qkv"]),
    ]
    if config.get("qk_norm"):
        rules += [rename(f"{original}attn.ln_{part}.weight", f"{ours}attn.norm_added_{part}.weight") for part in "qk"]
    if not is_last:
        rules += [
            rename(f"{original}attn.proj.*", f"{ours}attn.to_add_out.*"),
            rename(f"{original}mlp.fc1.*", f"{ours}ff_context.net.0.proj.*"),
            rename(f"{original}mlp.fc2.*", f"{ours}ff_context.net.2.*"),
        ]
    return rules


def _original_config(shapes: Shapes) -> dict[str, Any]:
    num_layers = count_blocks(shapes, "joint_blocks")
    return _config(
        shapes, num_layers, patches="x_embedder.proj.weight", positions="pos_embed",
        pooled="y_embedder.mlp.0.weight", output="final_layer.linear.weight",
        dual=[i for i in range(num_layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes],
        normed="joint_blocks.0.x_block.attn.ln_q.weight" in shapes)


def _diffusers_config(shapes: Shapes) -> dict[str, Any]:
    num_layers = count_blocks(shapes, "transformer_blocks")
    return _config(
        shapes, num_layers, patches="pos_embed.proj.weight", positions="pos_embed.pos_embed",
        pooled="time_text_embed.text_embedder.linear_1.weight", output="proj_out.weight",
        dual=[i for i in range(num_layers) if f"transformer_blocks.{i}.attn2.to_q.weight" in shapes],
        normed="transformer_blocks.0.attn.norm_q.weight" in shapes)


def _config(
    shapes: Shapes, num_layers: int, *, patches: str, positions: str, pooled: str, output: str, dual: list[int],
    normed: bool,
) -> dict[str, Any]:
    hidden_size, in_channels, patch_size, _ = shapes[patches]
    return {
        # the sizes that rows of the position table are cut for: 1024 pixels, 8 to a latent
        "sample_size": 128,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": shapes[output][0] // patch_size**2,
        "num_layers": num_layers,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": hidden_size // HEAD_DIM,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": hidden_size,
        "pooled_projection_dim": shapes[pooled][1],
        "pos_embed_max_size": math.isqrt(shapes[positions][1]),
        "dual_attention_layers": tuple(dual),
        "qk_norm": "rms_norm" if normed else None,
    }


def _our_names(config: Mapping[str, Any]) -> list[str]:
    return sd3_key_map(config).our_names()


_ORIGINAL = {
    "x_embedder.proj.weight": (None, None, None, None),
    "pos_embed": (1, None, None),
    "context_embedder.weight": (None, None),
    "joint_blocks.0.x_block.adaLN_modulation.1.weight": (None, None),
    "joint_blocks.0.context_block.attn.qkv.weight": (None, None),
    "final_layer.linear.weight": (None, None),
}
_DIFFUSERS = {
    "pos_embed.proj.weight": (None, None, None, None),
    "pos_embed.pos_embed": (1, None, None),
    "context_embedder.weight": (None, None),
    "transformer_blocks.0.norm1_context.linear.weight": (None, None),
    "transformer_blocks.0.attn.add_q_proj.weight": (None, None),
    "proj_out.weight": (None, None),
}


def _spec(kind: str, present: tuple[str, str] | None, absent: tuple[str, str] | None) -> ComponentSpec:
    def layout(index: int) -> Layout:
        original = index == 0
        return Layout(
            name="original" if original else "diffusers",
            signature={**(_ORIGINAL if original else _DIFFUSERS), **({present[index]: (None,)} if present else {})},
            absent=(absent[index],) if absent else (),
            prefixes=("", "model.diffusion_model.") if original else ("", "transformer."),
            key_map=sd3_key_map if original else None,
            config=_original_config if original else _diffusers_config,
        )

    return ComponentSpec(
        kind=kind, default_name="dit",
        class_path="diffusers.models.transformers.transformer_sd3.SD3Transformer2DModel",
        our_names=_our_names, layouts=(layout(0), layout(1)))


_QUERY_NORM = ("joint_blocks.0.x_block.attn.ln_q.weight", "transformer_blocks.0.attn.norm_q.weight")
SD3_DIT = _spec("sd3_dit", present=None, absent=_QUERY_NORM)
"""Stable Diffusion 3 (medium): attention without norms of its queries and keys."""
SD35_DIT = _spec("sd35_dit", present=_QUERY_NORM, absent=None)
"""Stable Diffusion 3.5 (large, large turbo, medium): with them, and in medium with a second attention."""
