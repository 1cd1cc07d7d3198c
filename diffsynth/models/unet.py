"""The UNet of latent diffusion (``UNet2DConditionModel``) in its two layouts, as several families use it.

Source: github.com/CompVis/stable-diffusion ``ldm/modules/diffusionmodules/openaimodel.py`` and
github.com/Stability-AI/generative-models ``sgm/modules/diffusionmodules/openaimodel.py``. The original counts its
blocks through (``input_blocks.7``), diffusers counts within a resolution (``down_blocks.2.resnets.0``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .keymap import KeyMap, Rule, rename
from .spec import ComponentSpec, Layout, Shapes, count_blocks

CLASS_PATH = "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel"
PREFIXES = ("", "model.diffusion_model.")
NUM_GROUPS = 32
HEAD_DIM = 64
"""Width of an attention head where the projections are linear (generative-models ``sd_xl_base.yaml``)."""
NUM_HEADS = 8
"""Heads at every level where the projections are convolutions (stable-diffusion ``v1-inference.yaml``); diffusers
takes this number under the name ``attention_head_dim``."""
ADDITION_TIME_EMBED_DIM = 256
"""Fourier features of each of the six sizes (generative-models ``sd_xl_base.yaml``, ``outdim``)."""

_RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
           "out_layers.3": "conv2"}
_TRANSFORMER = (
    *(f"{attention}.{part}" for attention in ("attn1", "attn2") for part in ("to_q.weight", "to_k.weight",
                                                                            "to_v.weight", "to_out.0.*")),
    "ff.net.0.proj.*", "ff.net.2.*", "norm1.*", "norm2.*", "norm3.*",
)


def unet_key_map(config: Mapping[str, Any]) -> KeyMap:
    """Table from the original names to those of ``UNet2DConditionModel`` for one configuration."""
    channels: Sequence[int] = config["block_out_channels"]
    depths = _depths(config)
    rules = [
        rename("time_embed.0.*", "time_embedding.linear_1.*"), rename("time_embed.2.*", "time_embedding.linear_2.*"),
        rename("input_blocks.0.0.*", "conv_in.*"),
        rename("out.0.*", "conv_norm_out.*"), rename("out.2.*", "conv_out.*"),
    ]
    if config.get("addition_embed_type") == "text_time":
        rules += [rename("label_emb.0.0.*", "add_embedding.linear_1.*"),
                  rename("label_emb.0.2.*", "add_embedding.linear_2.*")]
    rules += _down(channels, depths, config["layers_per_block"])
    rules += [*_resnet("middle_block.0", "mid_block.resnets.0"), *_resnet("middle_block.2", "mid_block.resnets.1")]
    rules += _attention("middle_block.1", "mid_block.attentions.0", config["transformer_layers_per_block"][-1])
    rules += _up(len(channels), depths, config["layers_per_block"])
    return KeyMap(tuple(rules))


def _depths(config: Mapping[str, Any]) -> list[int]:
    """Transformer blocks in each attention of a level; 0 where the level has none."""
    kinds, layers = config["down_block_types"], config["transformer_layers_per_block"]
    listed = [layers] * len(kinds) if isinstance(layers, int) else layers
    return [depth if kind == "CrossAttnDownBlock2D" else 0 for kind, depth in zip(kinds, listed, strict=True)]


def _down(channels: Sequence[int], depths: Sequence[int], num_resnets: int) -> Iterator[Rule]:
    block = 1
    for level, depth in enumerate(depths):
        for layer in range(num_resnets):
            widens = layer == 0 and channels[max(level - 1, 0)] != channels[level]
            yield from _resnet(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{layer}", shortcut=widens)
            yield from _attention(f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{layer}", depth)
            block += 1
        if level < len(depths) - 1:
            yield rename(f"input_blocks.{block}.0.op.*", f"down_blocks.{level}.downsamplers.0.conv.*")
            block += 1


def _up(num_levels: int, depths: Sequence[int], num_resnets: int) -> Iterator[Rule]:
    block = 0
    for level, depth in enumerate(reversed(depths)):
        for layer in range(num_resnets + 1):
            # every resnet on the way up also reads a skip connection, so that its width always changes
            yield from _resnet(f"output_blocks.{block}.0", f"up_blocks.{level}.resnets.{layer}", shortcut=True)
            yield from _attention(f"output_blocks.{block}.1", f"up_blocks.{level}.attentions.{layer}", depth)
            if layer == num_resnets and level < num_levels - 1:
                upsampler = f"output_blocks.{block}.{2 if depth else 1}.conv"
                yield rename(f"{upsampler}.*", f"up_blocks.{level}.upsamplers.0.conv.*")
            block += 1


def _resnet(original: str, ours: str, shortcut: bool = False) -> list[Rule]:
    rules = [rename(f"{original}.{theirs}.*", f"{ours}.{name}.*") for theirs, name in _RESNET.items()]
    return [*rules, rename(f"{original}.skip_connection.*", f"{ours}.conv_shortcut.*")] if shortcut else rules


def _attention(original: str, ours: str, depth: int) -> list[Rule]:
    if not depth:
        return []
    rules = [rename(f"{original}.{part}.*", f"{ours}.{part}.*") for part in ("norm", "proj_in", "proj_out")]
    return rules + [
        rename(f"{original}.transformer_blocks.{block}.{part}", f"{ours}.transformer_blocks.{block}.{part}")
        for block in range(depth) for part in _TRANSFORMER
    ]


def original_config(shapes: Shapes) -> dict[str, Any]:
    """Configuration of ``UNet2DConditionModel`` from the shapes of the original layout."""
    channels, depths, num_resnets = [], [], 0
    depth, width, resnets, attention = 0, 0, 0, ""
    num_blocks = count_blocks(shapes, "input_blocks")
    for block in range(1, num_blocks + 1):
        start = f"input_blocks.{block}"
        if f"{start}.0.out_layers.3.weight" in shapes:
            width, resnets = shapes[f"{start}.0.out_layers.3.weight"][0], resnets + 1
            depth = count_blocks(shapes, f"{start}.1.transformer_blocks")
            attention = f"{start}.1" if depth else attention
        else:  # the downsampler that ends a level, or the end of the blocks
            channels.append(width)
            depths.append(depth)
            num_resnets, resnets, depth = resnets, 0, 0
    return _config(
        shapes, channels, depths, num_resnets, attention,
        mid_depth=count_blocks(shapes, "middle_block.1.transformer_blocks"),
        conv_in="input_blocks.0.0.weight", conv_out="out.2.weight", sizes="label_emb.0.0.weight")


def diffusers_config(shapes: Shapes) -> dict[str, Any]:
    """The same from the diffusers layout."""
    levels = range(count_blocks(shapes, "down_blocks"))
    depths = [count_blocks(shapes, f"down_blocks.{level}.attentions.0.transformer_blocks") for level in levels]
    attention = next(f"down_blocks.{level}.attentions.0" for level, depth in enumerate(depths) if depth)
    return _config(
        shapes, [shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in levels], depths,
        count_blocks(shapes, "down_blocks.0.resnets"), attention,
        mid_depth=count_blocks(shapes, "mid_block.attentions.0.transformer_blocks"),
        conv_in="conv_in.weight", conv_out="conv_out.weight", sizes="add_embedding.linear_1.weight")


def _config(
    shapes: Shapes, channels: Sequence[int], depths: Sequence[int], num_resnets: int, attention: str, *,
    mid_depth: int, conv_in: str, conv_out: str, sizes: str,
) -> dict[str, Any]:
    linear = len(shapes[f"{attention}.proj_in.weight"]) == 2
    # the middle takes the depth of the last level, which may have no attention of its own
    layers = [*(depth or 1 for depth in depths[:-1]), mid_depth]
    config: dict[str, Any] = {
        "in_channels": shapes[conv_in][1],
        "out_channels": shapes[conv_out][0],
        "block_out_channels": list(channels),
        "layers_per_block": num_resnets,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "cross_attention_dim": shapes[f"{attention}.transformer_blocks.0.attn2.to_k.weight"][1],
        "attention_head_dim": [max(1, width // HEAD_DIM) for width in channels] if linear else NUM_HEADS,
        "transformer_layers_per_block": layers,
        "use_linear_projection": linear,
        "norm_num_groups": math.gcd(NUM_GROUPS, *channels),
    }
    if sizes in shapes:
        config |= {
            "addition_embed_type": "text_time", "addition_time_embed_dim": ADDITION_TIME_EMBED_DIM,
            "projection_class_embeddings_input_dim": shapes[sizes][1],
        }
    if "encoder_hid_proj.weight" in shapes:
        config |= {"encoder_hid_dim": shapes["encoder_hid_proj.weight"][1], "encoder_hid_dim_type": "text_proj",
                   "cross_attention_dim": shapes["encoder_hid_proj.weight"][0]}
    return config


def _our_names(config: Mapping[str, Any]) -> list[str]:
    names = unet_key_map(config).our_names()
    if config.get("encoder_hid_dim"):
        names += ["encoder_hid_proj.weight", "encoder_hid_proj.bias"]
    return names


_ORIGINAL_SIGNATURE = {
    "input_blocks.0.0.weight": (None, None, 3, 3),
    "time_embed.0.weight": (None, None),
    "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (None, None),
    "out.2.weight": (None, None, 3, 3),
}
_DIFFUSERS_SIGNATURE = {
    "conv_in.weight": (None, None, 3, 3),
    "time_embedding.linear_1.weight": (None, None),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (None, None),
    "conv_out.weight": (None, None, 3, 3),
}


def _layout(name: str, present: tuple[str, ...] = (), absent: tuple[str, ...] = ()) -> Layout:
    original = name == "original"
    return Layout(
        name=name,
        signature={**(_ORIGINAL_SIGNATURE if original else _DIFFUSERS_SIGNATURE), **dict.fromkeys(present)},
        absent=absent,
        prefixes=PREFIXES if original else ("", "unet."),
        key_map=unet_key_map if original else None,
        config=original_config if original else diffusers_config,
    )


SD_UNET = ComponentSpec(
    kind="sd_unet",
    default_name="unet",
    class_path=CLASS_PATH,
    our_names=_our_names,
    layouts=(
        _layout("original", absent=("label_emb.0.0.weight",)),
        _layout("diffusers", absent=("add_embedding.linear_1.weight", "encoder_hid_proj.weight")),
    ),
)
"""Stable Diffusion 1.x and 2.x: conditioned on text alone."""

SDXL_UNET = ComponentSpec(
    kind="sdxl_unet",
    default_name="unet",
    class_path=CLASS_PATH,
    our_names=_our_names,
    layouts=(
        _layout("original", present=("label_emb.0.0.weight",)),
        _layout("diffusers", present=("add_embedding.linear_1.weight",), absent=("encoder_hid_proj.weight",)),
    ),
)
"""Stable Diffusion XL: conditioned on text, pooled text and the six sizes."""

KOLORS_UNET = ComponentSpec(
    kind="kolors_unet",
    default_name="unet",
    class_path=CLASS_PATH,
    our_names=_our_names,
    layouts=(_layout("diffusers", present=("add_embedding.linear_1.weight", "encoder_hid_proj.weight")),),
)
"""Kolors: as Stable Diffusion XL, with a projection of ChatGLM's wider embeddings. Only the diffusers layout exists."""
