"""The image autoencoder (``AutoencoderKL``) that many families share, in its two layouts.

Source: github.com/CompVis/latent-diffusion ``ldm/modules/diffusionmodules/model.py``. The original numbers its decoder
levels from fine to coarse, diffusers from coarse to fine; its middle attention is 1x1 convolutions there, linear here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .keymap import KeyMap, Rule, rename
from .spec import ComponentSpec, Layout, Shapes, count_blocks

NUM_GROUPS = 32
PREFIXES = ("", "first_stage_model.", "vae.")
_RESNET_PARTS = ("norm1", "conv1", "norm2", "conv2")
_ATTENTION_PARTS = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def autoencoder_key_map(config: Mapping[str, Any]) -> KeyMap:
    """Table from the original names to those of ``AutoencoderKL`` for one configuration."""
    channels: Sequence[int] = config["block_out_channels"]
    num_blocks: int = config["layers_per_block"]
    coarse = list(reversed(channels))
    rules: list[Rule] = []
    for level in range(len(channels)):
        for block in range(num_blocks):
            rules += _resnet(f"encoder.down.{level}.block.{block}", f"encoder.down_blocks.{level}.resnets.{block}",
                             shortcut=block == 0 and channels[max(level - 1, 0)] != channels[level])
        if level < len(channels) - 1:
            rules.append(rename(f"encoder.down.{level}.downsample.conv.*",
                                f"encoder.down_blocks.{level}.downsamplers.0.conv.*"))
        original = f"decoder.up.{len(channels) - 1 - level}"
        for block in range(num_blocks + 1):
            rules += _resnet(f"{original}.block.{block}", f"decoder.up_blocks.{level}.resnets.{block}",
                             shortcut=block == 0 and coarse[max(level - 1, 0)] != coarse[level])
        if level < len(channels) - 1:
            rules.append(rename(f"{original}.upsample.conv.*", f"decoder.up_blocks.{level}.upsamplers.0.conv.*"))
    for half in ("encoder", "decoder"):
        rules += [
            rename(f"{half}.conv_in.*", f"{half}.conv_in.*"),
            rename(f"{half}.norm_out.*", f"{half}.conv_norm_out.*"),
            rename(f"{half}.conv_out.*", f"{half}.conv_out.*"),
            *_resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0"),
            *_resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1"),
        ]
        if config.get("mid_block_add_attention", True):
            rules += [
                rename(f"{half}.mid.attn_1.{part}.*", f"{half}.mid_block.attentions.0.{ours}.*", squeeze=part != "norm")
                for part, ours in _ATTENTION_PARTS.items()
            ]
    for name, present in (("quant_conv", "use_quant_conv"), ("post_quant_conv", "use_post_quant_conv")):
        if config.get(present, True):
            rules.append(rename(f"{name}.*", f"{name}.*"))
    return KeyMap(tuple(rules))


def _resnet(original: str, ours: str, shortcut: bool = False) -> list[Rule]:
    rules = [rename(f"{original}.{part}.*", f"{ours}.{part}.*") for part in _RESNET_PARTS]
    return [*rules, rename(f"{original}.nin_shortcut.*", f"{ours}.conv_shortcut.*")] if shortcut else rules


def original_config(shapes: Shapes) -> dict[str, Any]:
    """Configuration from the original layout, without the latents' scale and shift, which no shape shows."""
    num_levels = count_blocks(shapes, "encoder.down")
    channels = [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(num_levels)]
    return _config(shapes, channels, count_blocks(shapes, "encoder.down.0.block"), "encoder.mid.attn_1.q.weight")


def diffusers_config(shapes: Shapes) -> dict[str, Any]:
    """The same from the diffusers layout."""
    num_levels = count_blocks(shapes, "encoder.down_blocks")
    channels = [shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(num_levels)]
    return _config(shapes, channels, count_blocks(shapes, "encoder.down_blocks.0.resnets"),
                   "encoder.mid_block.attentions.0.to_q.weight")


def _config(shapes: Shapes, channels: Sequence[int], num_blocks: int, attention: str) -> dict[str, Any]:
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": list(channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "layers_per_block": num_blocks,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "norm_num_groups": math.gcd(NUM_GROUPS, *channels),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": attention in shapes,
    }


def _diffusers_key_map(config: Mapping[str, Any]) -> KeyMap:
    """The names of old exports (``query``, ``proj_attn``) beside today's; both are read."""
    names = [rename(name, name) for name in autoencoder_key_map(config).our_names()]
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    halves = [f"{half}.mid_block.attentions.0" for half in ("encoder", "decoder")]
    return KeyMap((*names, *(rename(f"{half}.{theirs}.*", f"{half}.{ours}.*", squeeze=True)
                             for half in halves for theirs, ours in old.items())))


def _our_names(config: Mapping[str, Any]) -> list[str]:
    return autoencoder_key_map(config).our_names()


FLUX_VAE_CONSTANTS: dict[str, Any] = {
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "force_upcast": True, "sample_size": 1024,
}  # fmt: skip
SD_VAE_CONSTANTS: dict[str, Any] = {"scaling_factor": 0.18215, "force_upcast": True, "sample_size": 512}
"""CompVis/stable-diffusion ``v1-inference.yaml``; a family whose latents are scaled otherwise says so itself."""

_QUANT_CONVS = {"quant_conv.weight": (None, None, 1, 1), "post_quant_conv.weight": (None, None, 1, 1)}
_ENDS = {
    "encoder.conv_in.weight": (None, None, 3, 3), "decoder.conv_in.weight": (None, None, 3, 3),
    "decoder.conv_out.weight": (None, None, 3, 3),
}
_ORIGINAL = {
    "encoder.down.0.block.0.conv1.weight": (None, None, 3, 3), "decoder.up.0.block.0.conv1.weight": (None, None, 3, 3),
}
_DIFFUSERS = {
    "encoder.down_blocks.0.resnets.0.conv1.weight": (None, None, 3, 3),
    "decoder.up_blocks.0.resnets.0.conv1.weight": (None, None, 3, 3),
}


def _spec(kind: str, constants: Mapping[str, Any], quant_convs: bool) -> ComponentSpec:
    def layout(name: str, ends: Mapping[str, tuple[int | None, ...]], config: Any, key_map: Any = None) -> Layout:
        return Layout(
            name=name,
            signature={**ends, **_ENDS, **(_QUANT_CONVS if quant_convs else {})},
            absent=() if quant_convs else tuple(_QUANT_CONVS),
            prefixes=PREFIXES,
            key_map=key_map,
            config=lambda shapes: {**config(shapes), **constants},
        )

    return ComponentSpec(
        kind=kind,
        default_name="vae",
        class_path="diffusers.models.autoencoders.autoencoder_kl.AutoencoderKL",
        our_names=_our_names,
        # the published configurations say force_upcast: in float16 pictures turn black
        safe_dtypes=("float32", "bfloat16"),
        layouts=(
            layout("original", _ORIGINAL, original_config, autoencoder_key_map),
            layout("diffusers", _DIFFUSERS, diffusers_config, _diffusers_key_map),
        ),
    )


FLUX_VAE = _spec("flux_vae", FLUX_VAE_CONSTANTS, quant_convs=False)
"""FLUX.1 and, with other constants, Stable Diffusion 3: sixteen channels."""
SD_VAE = _spec("sd_vae", SD_VAE_CONSTANTS, quant_convs=True)
"""Stable Diffusion 1.x and, with another scale, XL, Kolors and Hunyuan-DiT: four channels."""
