"""The transformer of Hunyuan-DiT (``HunyuanDiT2DModel``) in its two layouts, and its two text encoders.

Source: github.com/Tencent/HunyuanDiT ``hydit/modules/models.py``. There ``norm3`` stands before the cross-attention and
``norm2`` before the feed-forward, in diffusers the other way round; a plain rename would load and be wrong. The
original modulates at the end with (shift, scale), diffusers with (scale, shift).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .keymap import KeyMap, Rule, rename, split
from .spec import ComponentSpec, Layout, Shapes, count_blocks

POSITIONS_AND_STYLE = 6 * 256
"""Fourier features of the six sizes, one part of the extra embedding of versions 1.0 and 1.1."""


def hunyuan_dit_key_map(config: Mapping[str, Any]) -> KeyMap:
    """Table from the original names to those of ``HunyuanDiT2DModel`` for one configuration."""
    rules = [
        rename("text_embedding_padding", "text_embedding_padding"),
        rename("mlp_t5.0.*", "text_embedder.linear_1.*"), rename("mlp_t5.2.*", "text_embedder.linear_2.*"),
        rename("x_embedder.proj.*", "pos_embed.proj.*"),
        rename("pooler.positional_embedding", "time_extra_emb.pooler.positional_embedding"),
        *(rename(f"pooler.{part}_proj.*", f"time_extra_emb.pooler.{part}_proj.*") for part in "kqvc"),
        rename("final_layer.linear.*", "proj_out.*"),
        rename("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", swap_halves=True),
    ]
    for original, ours in (("t_embedder.mlp", "timestep_embedder"), ("extra_embedder", "extra_embedder")):
        rules += [rename(f"{original}.0.*", f"time_extra_emb.{ours}.linear_1.*"),
                  rename(f"{original}.2.*", f"time_extra_emb.{ours}.linear_2.*")]
    if config["use_style_cond_and_image_meta_size"]:
        rules.append(rename("style_embedder.weight", "time_extra_emb.style_embedder.weight"))
    for block in range(config["num_layers"]):
        # the second half of the blocks reads what the first half left
        rules += _block(f"blocks.{block}.", has_skip=block > config["num_layers"] // 2)
    return KeyMap(tuple(rules))


def _block(block: str, has_skip: bool) -> list[Rule]:
    rules = [
        rename(f"{block}norm1.*", f"{block}norm1.norm.*"),
        rename(f"{block}default_modulation.1.*", f"{block}norm1.linear.*"),
        rename(f"{block}norm3.*", f"{block}norm2.*"), rename(f"{block}norm2.*", f"{block}norm3.*"),
        rename(f"{block}mlp.fc1.*", f"{block}ff.net.0.proj.*"), rename(f"{block}mlp.fc2.*", f"{block}ff.net.2.*"),
        split(f"{block}attn1.Wqkv.*", [f"{block}attn1.to_{part}.*" for part in "qkv"]),
        rename(f"{block}attn2.q_proj.*", f"{block}attn2.to_q.*"),
        split(f"{block}attn2.kv_proj.*", [f"{block}attn2.to_{part}.*" for part in "kv"]),
    ]
    for attention in ("attn1", "attn2"):
        rules.append(rename(f"{block}{attention}.out_proj.*", f"{block}{attention}.to_out.0.*"))
        rules += [rename(f"{block}{attention}.{part}_norm.*", f"{block}{attention}.norm_{part}.*") for part in "qk"]
    if has_skip:
        rules += [rename(f"{block}{name}.*", f"{block}{name}.*") for name in ("skip_norm", "skip_linear")]
    return rules


def _original_config(shapes: Shapes) -> dict[str, Any]:
    return _config(shapes, t5="mlp_t5.0.weight", patches="x_embedder.proj.weight", pooler="pooler.",
                   mlp="blocks.0.mlp.fc1.weight", head="blocks.0.attn1.q_norm.weight", style="style_embedder.weight",
                   output="final_layer.linear.weight")


def _diffusers_config(shapes: Shapes) -> dict[str, Any]:
    return _config(shapes, t5="text_embedder.linear_1.weight", patches="pos_embed.proj.weight",
                   pooler="time_extra_emb.pooler.", mlp="blocks.0.ff.net.0.proj.weight",
                   head="blocks.0.attn1.norm_q.weight", style="time_extra_emb.style_embedder.weight",
                   output="proj_out.weight")


def _config(
    shapes: Shapes, *, t5: str, patches: str, pooler: str, mlp: str, head: str, style: str, output: str
) -> dict[str, Any]:
    hidden_size, in_channels, patch_size, _ = shapes[patches]
    head_dim = shapes[head][0]
    text_length, cross_attention_dim = shapes["text_embedding_padding"]
    text_length_t5 = shapes[pooler + "positional_embedding"][0] - 1
    return {
        "num_attention_heads": hidden_size // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "patch_size": patch_size,
        "activation_fn": "gelu-approximate",
        "sample_size": 128,
        "hidden_size": hidden_size,
        "num_layers": count_blocks(shapes, "blocks"),
        # the class rounds down what it multiplies out: only the exact quotient gives the width back
        "mlp_ratio": shapes[mlp][0] / hidden_size,
        "learn_sigma": shapes[output][0] == 2 * in_channels * patch_size**2,
        "cross_attention_dim": cross_attention_dim,
        "norm_type": "layer_norm",
        "cross_attention_dim_t5": shapes[t5][1],
        "pooled_projection_dim": shapes[pooler + "c_proj.weight"][0],
        "text_len": text_length - text_length_t5,
        "text_len_t5": text_length_t5,
        "use_style_cond_and_image_meta_size": style in shapes,
    }


def _our_names(config: Mapping[str, Any]) -> list[str]:
    return hunyuan_dit_key_map(config).our_names()


HUNYUAN_DIT = ComponentSpec(
    kind="hunyuan_dit",
    family="hunyuan_dit",
    default_name="dit",
    class_path="diffusers.models.transformers.hunyuan_transformer_2d.HunyuanDiT2DModel",
    our_names=_our_names,
    layouts=(
        Layout(
            name="original",
            signature={
                "text_embedding_padding": (None, None), "mlp_t5.0.weight": (None, None),
                "blocks.0.attn1.Wqkv.weight": (None, None), "final_layer.linear.weight": (None, None),
            },
            # what the training code writes keeps the weights under the name of their average
            prefixes=("", "ema.", "module."),
            key_map=hunyuan_dit_key_map,
            config=_original_config,
        ),
        Layout(
            name="diffusers",
            signature={
                "text_embedding_padding": (None, None), "text_embedder.linear_1.weight": (None, None),
                "blocks.0.attn1.to_q.weight": (None, None), "proj_out.weight": (None, None),
            },
            prefixes=("", "transformer."),
            config=_diffusers_config,
        ),
    ),
)

BERT_HEAD_DIM = 64


def _bert_config(shapes: Shapes) -> dict[str, Any]:
    vocab_size, hidden_size = shapes["embeddings.word_embeddings.weight"]
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": count_blocks(shapes, "encoder.layer"),
        "num_attention_heads": max(1, hidden_size // BERT_HEAD_DIM),
        "intermediate_size": shapes["encoder.layer.0.intermediate.dense.weight"][0],
        "max_position_embeddings": shapes["embeddings.position_embeddings.weight"][0],
        "type_vocab_size": shapes["embeddings.token_type_embeddings.weight"][0],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }


_BERT_LAYER = "encoder.layer.{layer}."
_BERT_NAMES = (
    *(f"embeddings.{name}.weight" for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")),
    "embeddings.LayerNorm.*",
    *(f"{_BERT_LAYER}attention.self.{name}.*" for name in ("query", "key", "value")),
    *(f"{_BERT_LAYER}{name}.*" for name in ("attention.output.dense", "attention.output.LayerNorm",
                                           "intermediate.dense", "output.dense", "output.LayerNorm")),
)


def _bert_names(config: Mapping[str, Any]) -> list[str]:
    layers = {"layer": config["num_hidden_layers"]}
    return KeyMap(tuple(rename(name, name) for name in _BERT_NAMES), layers).our_names()


BERT = ComponentSpec(
    kind="bert",
    default_name="text_encoder",
    class_path="transformers.models.bert.modeling_bert.BertModel",
    our_names=_bert_names,
    arguments={"add_pooling_layer": False},
    layouts=(
        Layout(
            name="diffusers",
            signature={
                "embeddings.word_embeddings.weight": (None, None),
                "embeddings.token_type_embeddings.weight": (None, None),
                "encoder.layer.0.attention.self.query.weight": (None, None),
            },
            prefixes=("bert.", ""),
            config=_bert_config,
            ignored=(r"embeddings\.position_ids", r"pooler\.dense\..*"),
        ),
    ),
)
"""The Chinese CLIP's text tower of Hunyuan-DiT; its last hidden state is used, never its pooler."""
