"""A tiny FLUX.1 with random weights, in every layout that the published one comes in.

The networks are the real classes, the tokenizers know a few words. Nothing is downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from tests.contract.tiny import TinyFamily

SENTENCES = [
    "a dog", "a cat", "a dog is jumping, flowers around the dog, the background is mountains and clouds",
    "a photo of a red circle on a blue background", "two green squares and a yellow star", "bad quality, doll, toy",
]


def save_tokenizers(folder: Path, max_length: int = 512) -> tuple[int, int]:
    """Write ``tokenizer`` (CLIP, byte-pair) and ``tokenizer_2`` (T5, unigram); return their vocabulary sizes.

    Both know the letters and the words of ``SENTENCES``. They are written down rather than trained, because trainers
    give another vocabulary each time, and with it other weights and other losses.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer, T5TokenizerFast

    words = sorted({word for sentence in SENTENCES for word in re.findall("[a-z]+", sentence)})
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        letters = [*word[:-1], word[-1] + "</w>"]
        merges.update({("".join(letters[:end]), letters[end]): None for end in range(1, len(letters))})
    vocab: dict[str, int] = {}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    for token in [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]:
        vocab.setdefault(token, len(vocab))
    vocab["<|startoftext|>"] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    clip = CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=77)
    clip.save_pretrained(folder / "tokenizer")

    space = "\N{LOWER ONE EIGHTH BLOCK}"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (space, -4.0),
              *((chr(code), -6.0) for code in range(33, 127)), *((space + word, -3.0) for word in words)]
    t5 = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=max_length)
    t5.save_pretrained(folder / "tokenizer_2")
    return len(vocab), len(pieces)


def build_pipeline(folder: Path, *, guidance_embeds: bool = True, seed: int = 0):
    """A ``diffusers.FluxPipeline`` of tiny networks in float32, with tokenizers in ``folder``."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

    clip_vocab, t5_vocab = save_tokenizers(folder)
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=2, attention_head_dim=128, num_attention_heads=1,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=guidance_embeds, axes_dims_rope=(16, 56, 56),
    )
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(32, 32, 64, 64), layers_per_block=1,
        latent_channels=16, norm_num_groups=32, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
        use_post_quant_conv=False, sample_size=64,
    )
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=clip_vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1,
        max_position_embeddings=77, projection_dim=64, hidden_act="quick_gelu", bos_token_id=clip_vocab - 2,
        eos_token_id=clip_vocab - 1, pad_token_id=clip_vocab - 1))
    t5 = T5EncoderModel(T5Config(
        vocab_size=t5_vocab, d_model=64, d_ff=128, d_kv=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, use_cache=False))
    for network in (transformer, vae, clip, t5):
        network.eval()
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds)
    return FluxPipeline(
        scheduler=scheduler, vae=vae, text_encoder=clip, text_encoder_2=t5, transformer=transformer,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
    )


def save_original_layout(pipe, folder: Path, *, shard_t5: bool = True) -> Path:
    """Write the files of the older page (``models/FLUX/FLUX.1-dev``) for a diffusers pipeline."""
    from safetensors.torch import save_file

    from diffsynth.models.autoencoder_kl import FLUX_VAE
    from diffsynth.pipelines.flux_components import FLUX_DIT

    folder.mkdir(parents=True, exist_ok=True)
    for spec, module, name in ((FLUX_DIT, pipe.transformer, "flux1-dev"), (FLUX_VAE, pipe.vae, "ae")):
        layout = next(layout for layout in spec.layouts if layout.name == "original")
        ours = {key: tensor.contiguous() for key, tensor in module.state_dict().items()}
        key_map = layout.key_map(dict(module.config))
        original = {key: tensor.contiguous().clone() for key, tensor in key_map.to_original(ours).items()}
        save_file(original, folder / f"{name}.safetensors")
    pipe.text_encoder.save_pretrained(folder / "text_encoder")
    size = sum(p.numel() * p.element_size() for p in pipe.text_encoder_2.parameters())
    pipe.text_encoder_2.save_pretrained(folder / "text_encoder_2", max_shard_size=size * 2 // 3 if shard_t5 else "5GB")
    pipe.tokenizer.save_pretrained(folder / "tokenizer")
    pipe.tokenizer_2.save_pretrained(folder / "tokenizer_2")
    return folder


def model_files(folder: Path) -> list[str]:
    """The model files of the older page's inference script, in its order."""
    return [str(folder / name) for name in (
        "text_encoder/model.safetensors", "text_encoder_2", "ae.safetensors", "flux1-dev.safetensors")]


def make(folder: Path) -> Path:
    """The files of the older page, made on the spot."""
    folder.mkdir(parents=True, exist_ok=True)
    return save_original_layout(build_pipeline(folder / "tokenizers"), folder / "FLUX" / "FLUX.1-dev")


def diffusers_pipeline(transformer: torch.nn.Module):
    """A ``diffusers.FluxPipeline`` that is nothing but its transformer."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
                        text_encoder_2=None, tokenizer_2=None, transformer=transformer)


def published_width() -> torch.nn.Module:
    """FLUX.1's transformer with one block of each kind, on the meta device."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        return FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


TINY = TinyFamily(
    name="flux", make=make, model_files=model_files, recorded_names="flux1-dev",
    diffusers_pipeline=diffusers_pipeline, published_width=published_width,
    options=dict(lora_base_model="dit", lora_target_modules="to_q,to_k,to_v", max_sequence_length=16),
)
