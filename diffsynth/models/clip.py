"""CLIP's text encoders as several families use them.

transformers 5 took the level ``text_model.`` out of ``CLIPTextModel``; files have it, and both spellings are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .keymap import KeyMap, rename
from .spec import ComponentSpec, Layout, Shapes, count_blocks

HEAD_DIM = 64
PUBLISHED_VOCABULARY = 49408
NESTED = "text_model."
BUNDLES = ("text_encoders.clip_l.transformer.", "conditioner.embedders.0.transformer.", "cond_stage_model.transformer.")
_LAYER = "encoder.layers.{layer}."
_NAMES = (
    "embeddings.token_embedding.weight",
    "embeddings.position_embedding.weight",
    *(f"{_LAYER}self_attn.{name}.*" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *(f"{_LAYER}{name}.*" for name in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")),
    "final_layer_norm.*",
)


def clip_key_map(config: Mapping[str, Any] | None = None) -> KeyMap:
    """Table from the names in files (``text_model.``) to those of ``CLIPTextModel``."""
    counts = {} if config is None else {"layer": config["num_hidden_layers"]}
    return KeyMap(tuple(rename(NESTED + name, name) for name in _NAMES), counts)


def _our_names(config: Mapping[str, Any]) -> list[str]:
    return clip_key_map(config).our_names()


def _nested_config(shapes: Shapes) -> dict[str, Any]:
    return _config({key.removeprefix(NESTED): shape for key, shape in shapes.items()})


def _config(shapes: Shapes) -> dict[str, Any]:
    vocab_size, hidden_size = shapes["embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count_blocks(shapes, "encoder.layers"),
        "num_attention_heads": max(1, hidden_size // HEAD_DIM),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "projection_dim": hidden_size,
        # not shown by any shape: with gelu everything loads and the pictures are subtly wrong
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": vocab_size - 2,
        # 2 would select the pooling of transformers 4.24 (largest token id)
        "eos_token_id": PUBLISHED_VOCABULARY - 1 if vocab_size == PUBLISHED_VOCABULARY else vocab_size - 1,
    }


_SIGNATURE = {
    "embeddings.token_embedding.weight": (None, None),
    "embeddings.position_embedding.weight": (None, None),
    "encoder.layers.0.mlp.fc1.weight": (None, None),
    "encoder.layers.0.self_attn.q_proj.bias": (None,),
    "final_layer_norm.weight": (None,),
}
_NESTED_SIGNATURE = {NESTED + key: shape for key, shape in _SIGNATURE.items()}
_IMAGE_TOWER = ("vision_model.embeddings.class_embedding", "visual_projection.weight")

CLIP_L = ComponentSpec(
    kind="clip_l",
    default_name="text_encoder",
    class_path="transformers.models.clip.modeling_clip.CLIPTextModel",
    our_names=_our_names,
    layouts=(
        Layout(
            name="original",
            signature=_NESTED_SIGNATURE,
            absent=("text_projection.weight", *_IMAGE_TOWER),
            prefixes=("", *BUNDLES),
            key_map=clip_key_map,
            config=_nested_config,
            ignored=(r"text_model\.embeddings\.position_ids", r"logit_scale"),
        ),
        Layout(  # ComfyUI's fine-tuned CLIP-L files carry a projection that this encoder does not use
            name="original",
            signature={
                **_NESTED_SIGNATURE,
                "text_model.embeddings.token_embedding.weight": (None, 768),
                "text_projection.weight": (768, 768),
            },
            absent=_IMAGE_TOWER,
            prefixes=("", *BUNDLES),
            key_map=clip_key_map,
            config=_nested_config,
            ignored=(r"text_model\.embeddings\.position_ids", r"text_projection\.weight", r"logit_scale"),
        ),
        Layout(
            name="diffusers",
            signature=_SIGNATURE,
            absent=("text_projection.weight", "embeddings.class_embedding"),
            prefixes=("", *BUNDLES),
            config=_config,
            ignored=(r"embeddings\.position_ids", r"logit_scale"),
        ),
    ),
)
