"""CLIP's text encoders with their projection (``CLIPTextModelWithProjection``): CLIP-G, and CLIP-L as SD3 uses it.

CLIP-G is published under two sets of names: those of transformers, and those of OpenCLIP inside SDXL's single file.
Source of the latter: github.com/mlfoundations/open_clip ``src/open_clip/transformer.py``; its projection is a matrix
(in, out), that of transformers (out, in), and both are square, so that a forgotten transpose would load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .clip import BUNDLES, CLIP_L, HEAD_DIM, NESTED, PUBLISHED_VOCABULARY
from .keymap import KeyMap, Rule, rename, split
from .spec import ComponentSpec, Layout, Shapes, count_blocks

CLASS_PATH = "transformers.models.clip.modeling_clip.CLIPTextModelWithProjection"
CLIP_G_BUNDLES = ("text_encoders.clip_g.transformer.",)
OPENCLIP_BUNDLES = ("", "conditioner.embedders.1.model.", "conditioner.embedders.0.model.", "cond_stage_model.model.")
_LAYER = f"{NESTED}encoder.layers.{{layer}}."
_BLOCK = "transformer.resblocks.{layer}."
_NAMES = (
    f"{NESTED}embeddings.token_embedding.weight",
    f"{NESTED}embeddings.position_embedding.weight",
    *(f"{_LAYER}self_attn.{name}.*" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *(f"{_LAYER}{name}.*" for name in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")),
    f"{NESTED}final_layer_norm.*",
    "text_projection.weight",
)
_OPENCLIP: tuple[Rule, ...] = (
    rename("token_embedding.weight", f"{NESTED}embeddings.token_embedding.weight"),
    rename("positional_embedding", f"{NESTED}embeddings.position_embedding.weight"),
    *(split(f"{_BLOCK}attn.in_proj_{leaf}", [f"{_LAYER}self_attn.{name}_proj.{leaf}" for name in "qkv"])
      for leaf in ("weight", "bias")),
    rename(f"{_BLOCK}attn.out_proj.*", f"{_LAYER}self_attn.out_proj.*"),
    rename(f"{_BLOCK}ln_1.*", f"{_LAYER}layer_norm1.*"),
    rename(f"{_BLOCK}ln_2.*", f"{_LAYER}layer_norm2.*"),
    rename(f"{_BLOCK}mlp.c_fc.*", f"{_LAYER}mlp.fc1.*"),
    rename(f"{_BLOCK}mlp.c_proj.*", f"{_LAYER}mlp.fc2.*"),
    rename("ln_final.*", f"{NESTED}final_layer_norm.*"),
    rename("text_projection", "text_projection.weight", transpose=True),
)


def openclip_key_map(config: Mapping[str, Any] | None = None) -> KeyMap:
    """Table from OpenCLIP's names to those of ``CLIPTextModelWithProjection``."""
    return KeyMap(_OPENCLIP, _counts(config))


def _counts(config: Mapping[str, Any] | None) -> dict[str, int]:
    return {} if config is None else {"layer": config["num_hidden_layers"]}


def _our_names(config: Mapping[str, Any]) -> list[str]:
    return KeyMap(tuple(rename(name, name) for name in _NAMES), _counts(config)).our_names()


def _openclip_config(shapes: Shapes) -> dict[str, Any]:
    return _config(shapes["token_embedding.weight"], shapes["positional_embedding"][0],
                   shapes["transformer.resblocks.0.mlp.c_fc.weight"][0], count_blocks(shapes, "transformer.resblocks"),
                   shapes["text_projection"][1], hidden_act="gelu")


def _clip_g_config(shapes: Shapes) -> dict[str, Any]:
    return _nested_config(shapes, hidden_act="gelu")


def _clip_l_config(shapes: Shapes) -> dict[str, Any]:
    return _nested_config(shapes, hidden_act="quick_gelu")


def _nested_config(shapes: Shapes, hidden_act: str) -> dict[str, Any]:
    embedding = shapes[f"{NESTED}embeddings.token_embedding.weight"]
    return _config(
        embedding, shapes[f"{NESTED}embeddings.position_embedding.weight"][0],
        shapes[f"{NESTED}encoder.layers.0.mlp.fc1.weight"][0], count_blocks(shapes, f"{NESTED}encoder.layers"),
        shapes.get("text_projection.weight", embedding[1:])[0], hidden_act)


def _config(
    embedding: tuple[int, ...], positions: int, intermediate_size: int, num_layers: int, projection_dim: int,
    hidden_act: str,
) -> dict[str, Any]:
    vocab_size, hidden_size = embedding
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": max(1, hidden_size // HEAD_DIM),
        "max_position_embeddings": positions,
        "projection_dim": projection_dim,
        "hidden_act": hidden_act,
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocab_size - 2,
        "eos_token_id": PUBLISHED_VOCABULARY - 1 if vocab_size == PUBLISHED_VOCABULARY else vocab_size - 1,
    }


_NESTED_SIGNATURE = {
    f"{NESTED}embeddings.token_embedding.weight": (None, None),
    f"{NESTED}embeddings.position_embedding.weight": (None, None),
    f"{NESTED}encoder.layers.0.mlp.fc1.weight": (None, None),
    f"{NESTED}final_layer_norm.weight": (None,),
}
_IMAGE_TOWER = ("vision_model.embeddings.class_embedding", "visual_projection.weight")
_IGNORED = (r"text_model\.embeddings\.position_ids", r"logit_scale")

CLIP_G = ComponentSpec(
    kind="clip_g",
    default_name="text_encoder_2",
    class_path=CLASS_PATH,
    our_names=_our_names,
    layouts=(
        Layout(
            name="original",
            signature={
                "token_embedding.weight": (None, None), "positional_embedding": (None, None),
                "transformer.resblocks.0.attn.in_proj_weight": (None, None), "text_projection": (None, None),
                "ln_final.weight": (None,),
            },
            absent=("visual.conv1.weight",),
            prefixes=OPENCLIP_BUNDLES,
            key_map=openclip_key_map,
            config=_openclip_config,
            ignored=(r"logit_scale", r"attn_mask"),
        ),
        Layout(
            name="diffusers",
            signature={**_NESTED_SIGNATURE, "text_projection.weight": (None, None)},
            absent=_IMAGE_TOWER,
            prefixes=("", *CLIP_G_BUNDLES),
            config=_clip_g_config,
            ignored=_IGNORED,
        ),
    ),
)
"""OpenCLIP bigG: the second text encoder of Stable Diffusion XL and 3."""

CLIP_L_PROJECTED = ComponentSpec(
    kind="clip_l_projected",
    variant_of=CLIP_L.kind,
    default_name="text_encoder",
    class_path=CLASS_PATH,
    our_names=_our_names,
    identity=("text_projection.weight",),
    layouts=(
        Layout(
            name="diffusers",
            signature=_NESTED_SIGNATURE,
            absent=("text_projection.weight", *_IMAGE_TOWER),
            prefixes=("", *BUNDLES),
            config=_clip_l_config,
            ignored=_IGNORED,
        ),
        Layout(
            name="diffusers",
            signature={**_NESTED_SIGNATURE, "text_projection.weight": (768, 768)},
            absent=_IMAGE_TOWER,
            prefixes=("", *BUNDLES),
            config=_clip_l_config,
            ignored=_IGNORED,
        ),
    ),
)
"""CLIP-L with the projection of its pooled output, which the single files leave out because it is the identity.

Source: Stability-AI/sd3.5 ``other_impls.py`` (``text_projection`` set to ``torch.eye``).
"""
