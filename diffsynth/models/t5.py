"""T5 v1.1 encoders. Its two embeddings are one tensor; published files hold either name or both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .keymap import KeyMap, rename
from .spec import ComponentSpec, Layout, Shapes, count_blocks

_BLOCK = "encoder.block.{block}."
_FIRST = "encoder.block.0.layer.0.SelfAttention."
_NAMES = (
    "shared.weight",
    "encoder.embed_tokens.weight",
    f"{_FIRST}relative_attention_bias.weight",
    *(f"{_BLOCK}layer.0.SelfAttention.{name}.weight" for name in "qkvo"),
    f"{_BLOCK}layer.0.layer_norm.weight",
    *(f"{_BLOCK}layer.1.DenseReluDense.{name}.weight" for name in ("wi_0", "wi_1", "wo")),
    f"{_BLOCK}layer.1.layer_norm.weight",
    "encoder.final_layer_norm.weight",
)


def _our_names(config: Mapping[str, Any]) -> list[str]:
    return KeyMap(tuple(rename(name, name) for name in _NAMES), {"block": config["num_layers"]}).our_names()


def _config(shapes: Shapes) -> dict[str, Any]:
    embedding = shapes.get("shared.weight") or shapes["encoder.embed_tokens.weight"]
    num_buckets, num_heads = shapes[f"{_FIRST}relative_attention_bias.weight"]
    return {
        "vocab_size": embedding[0],
        "d_model": embedding[1],
        "d_kv": shapes[f"{_FIRST}q.weight"][0] // num_heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": count_blocks(shapes, "encoder.block"),
        "num_heads": num_heads,
        "relative_attention_num_buckets": num_buckets,
        # the rest is what T5 v1.1 was trained with
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.1,
    }


_SIGNATURE = {
    f"{_FIRST}relative_attention_bias.weight": (None, None),
    f"{_FIRST}q.weight": (None, None),
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (None, None),
}
_ABSENT = (
    # a table in every block is umT5; a decoder is the full model of another text encoder
    "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight",
    "decoder.block.0.layer.0.SelfAttention.q.weight",
    "lm_head.weight",
)
_PREFIXES = ("", "text_encoders.t5xxl.transformer.")

T5_XXL = ComponentSpec(
    kind="t5xxl",
    default_name="text_encoder_2",
    class_path="transformers.models.t5.modeling_t5.T5EncoderModel",
    our_names=_our_names,
    # activations beyond 65504 are usual in it; it was trained in bfloat16
    safe_dtypes=("bfloat16", "float32"),
    tied={"encoder.embed_tokens.weight": "shared.weight"},
    layouts=tuple(
        Layout(
            name="diffusers",
            signature={**_SIGNATURE, embedding: (None, None)},
            absent=_ABSENT,
            prefixes=_PREFIXES,
            config=_config,
            ignored=(r"logit_scale",),
        )
        for embedding in ("shared.weight", "encoder.embed_tokens.weight")
    ),
)

MT5_XL = ComponentSpec(
    kind="mt5",
    variant_of=T5_XXL.kind,
    default_name="text_encoder_2",
    class_path=T5_XXL.class_path,
    our_names=_our_names,
    tied=T5_XXL.tied,
    layouts=tuple(
        Layout(
            name="diffusers",
            signature={**_SIGNATURE, embedding: (None, None)},
            absent=_ABSENT[:1],
            config=_config,
            ignored=(r"logit_scale", r"decoder\..*", r"lm_head\.weight"),
        )
        for embedding in ("shared.weight", "encoder.embed_tokens.weight")
    ),
)
"""The multilingual T5, published as the full model; only its encoder is used."""
