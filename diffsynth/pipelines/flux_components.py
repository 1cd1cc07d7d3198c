"""The FLUX.1 transformer in files: how it is recognised, configured and renamed.

Source: github.com/black-forest-labs/flux, ``src/flux/model.py``. The final layer's modulation is (shift, scale) there
and (scale, shift) in diffusers; q, k, v are fused there, and in the single blocks q, k, v and the MLP's first layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.errors import UserError
from ..models.keymap import KeyMap, Rule, rename, split
from ..models.spec import ComponentSpec, Layout, Shapes, count_blocks

MLP_RATIO = 4


def flux_key_map(config: Mapping[str, Any] | None = None) -> KeyMap:
    """Table from the names of the original release to those of ``FluxTransformer2DModel``.

    Args:
        config: Configuration; needed only to list all names (``KeyMap.pairs``), not to convert any.
    """
    double, single = "double_blocks.{double}.", "single_blocks.{single}."
    ours, ours_single = "transformer_blocks.{double}.", "single_transformer_blocks.{single}."
    rules: list[Rule] = [
        rename("img_in.*", "x_embedder.*"),
        rename("txt_in.*", "context_embedder.*"),
        rename("final_layer.linear.*", "proj_out.*"),
        rename("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", swap_halves=True),
    ]
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
    if config is not None and not config["guidance_embeds"]:
        del embedders["guidance_in"]
    for original, embedder in embedders.items():
        rules.append(rename(f"{original}.in_layer.*", f"time_text_embed.{embedder}.linear_1.*"))
        rules.append(rename(f"{original}.out_layer.*", f"time_text_embed.{embedder}.linear_2.*"))
    streams = (
        ("img", "norm1", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
        ("txt", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"),
         "to_add_out", "ff_context"),
    )  # fmt: skip
    for stream, norm, qkv, (norm_q, norm_k), out, mlp in streams:
        rules += [
            rename(f"{double}{stream}_mod.lin.*", f"{ours}{norm}.linear.*"),
            split(f"{double}{stream}_attn.qkv.*", [f"{ours}attn.{name}.*" for name in qkv]),
            rename(f"{double}{stream}_attn.norm.query_norm.scale", f"{ours}attn.{norm_q}.weight"),
            rename(f"{double}{stream}_attn.norm.key_norm.scale", f"{ours}attn.{norm_k}.weight"),
            rename(f"{double}{stream}_attn.proj.*", f"{ours}attn.{out}.*"),
            rename(f"{double}{stream}_mlp.0.*", f"{ours}{mlp}.net.0.proj.*"),
            rename(f"{double}{stream}_mlp.2.*", f"{ours}{mlp}.net.2.*"),
        ]
    fused = [f"{ours_single}{name}.*" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    rules += [
        rename(f"{single}modulation.lin.*", f"{ours_single}norm.linear.*"),
        split(f"{single}linear1.*", fused, (1, 1, 1, MLP_RATIO)),
        rename(f"{single}linear2.*", f"{ours_single}proj_out.*"),
        rename(f"{single}norm.query_norm.scale", f"{ours_single}attn.norm_q.weight"),
        rename(f"{single}norm.key_norm.scale", f"{ours_single}attn.norm_k.weight"),
    ]
    counts = {} if config is None else {"double": config["num_layers"], "single": config["num_single_layers"]}
    return KeyMap(tuple(rules), counts)


def _original_config(shapes: Shapes) -> dict[str, Any]:
    return _config(
        in_channels=shapes["img_in.weight"][1],
        out_channels=shapes["final_layer.linear.weight"][0],
        num_layers=count_blocks(shapes, "double_blocks"),
        num_single_layers=count_blocks(shapes, "single_blocks"),
        hidden_size=shapes["img_in.weight"][0],
        head_dim=shapes["double_blocks.0.img_attn.norm.key_norm.scale"][0],
        joint_attention_dim=shapes["txt_in.weight"][1],
        pooled_projection_dim=shapes["vector_in.in_layer.weight"][1],
        guidance_embeds="guidance_in.in_layer.weight" in shapes,
    )


def _diffusers_config(shapes: Shapes) -> dict[str, Any]:
    embed = "time_text_embed."
    return _config(
        in_channels=shapes["x_embedder.weight"][1],
        out_channels=shapes["proj_out.weight"][0],
        num_layers=count_blocks(shapes, "transformer_blocks"),
        num_single_layers=count_blocks(shapes, "single_transformer_blocks"),
        hidden_size=shapes["x_embedder.weight"][0],
        head_dim=shapes["transformer_blocks.0.attn.norm_k.weight"][0],
        joint_attention_dim=shapes["context_embedder.weight"][1],
        pooled_projection_dim=shapes[f"{embed}text_embedder.linear_1.weight"][1],
        guidance_embeds=f"{embed}guidance_embedder.linear_1.weight" in shapes,
    )


def _config(*, hidden_size: int, head_dim: int, **shown: Any) -> dict[str, Any]:
    return {
        "patch_size": 1,
        **shown,
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden_size // head_dim,
        "axes_dims_rope": _rope_axes(head_dim),
    }


def _rope_axes(head_dim: int) -> tuple[int, int, int]:
    """(16, 56, 56) for the published 128; other widths keep the ratio, in even numbers that add up."""
    if head_dim < 8 or head_dim % 2:
        raise UserError(f"the heads of a FLUX transformer have an even number of channels, at least 8, not {head_dim}.")
    first = max(2, 2 * round(head_dim / 16))
    while (head_dim - first) % 4:
        first += 2
    return first, (head_dim - first) // 2, (head_dim - first) // 2


def _our_names(config: Mapping[str, Any]) -> list[str]:
    return flux_key_map(config).our_names()


FLUX_DIT = ComponentSpec(
    kind="flux_dit",
    family="flux",
    default_name="dit",
    class_path="diffusers.models.transformers.transformer_flux.FluxTransformer2DModel",
    our_names=_our_names,
    layouts=(
        Layout(
            name="original",
            signature={
                "img_in.weight": (None, None),
                "txt_in.weight": (None, None),
                "vector_in.in_layer.weight": (None, None),
                "final_layer.linear.weight": (None, None),
                "double_blocks.0.img_mod.lin.weight": (None, None),
                "double_blocks.0.img_attn.norm.key_norm.scale": (None,),
            },
            prefixes=("", "model.diffusion_model."),
            key_map=flux_key_map,
            config=_original_config,
        ),
        Layout(
            name="diffusers",
            signature={
                "x_embedder.weight": (None, None),
                "context_embedder.weight": (None, None),
                "proj_out.weight": (None, None),
                "time_text_embed.text_embedder.linear_1.weight": (None, None),
                "transformer_blocks.0.norm1_context.linear.weight": (None, None),
                "transformer_blocks.0.attn.norm_k.weight": (None,),
            },
            prefixes=("", "transformer."),
            config=_diffusers_config,
        ),
    ),
)
