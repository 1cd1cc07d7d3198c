"""Models and pictures to measure with: a small FLUX with random weights (160 M parameters), drawn pictures, metadata.

Everything is made from a seed and written once, under ``benchmarks/data``. Nothing is downloaded.
"""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

DATA = Path(__file__).parent / "data"
WORDS = ("photo", "red", "green", "blue", "small", "large", "old", "circle", "square", "star", "on", "under", "near",
         "wooden", "metal", "table", "wall", "sky", "sea", "forest", "house", "cat", "dog", "bird", "car", "morning")


@dataclass(frozen=True, kw_only=True)
class FluxSizes:
    """Sizes of a FLUX with everything that decides its speed as in FLUX.1: heads of 128, rotary axes, packing."""

    hidden: int = 768
    num_double: int = 4
    num_single: int = 8
    t5_dim: int = 512
    clip_dim: int = 256


SIZES = FluxSizes()


def transformer_config(sizes: FluxSizes) -> dict:
    """Arguments of ``FluxTransformer2DModel``."""
    return dict(
        patch_size=1, in_channels=64, num_layers=sizes.num_double, num_single_layers=sizes.num_single,
        attention_head_dim=128, num_attention_heads=sizes.hidden // 128, joint_attention_dim=sizes.t5_dim,
        pooled_projection_dim=sizes.clip_dim, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    )


def make_flux(folder: Path, sizes: FluxSizes = SIZES) -> None:
    """Write a complete FLUX, bfloat16, in the folders of a diffusers pipeline."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    clip_vocab, t5_vocab = _save_tokenizers(folder)
    networks = {
        "transformer": FluxTransformer2DModel(**transformer_config(sizes)),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 64, 128, 128), layers_per_block=2, latent_channels=16, norm_num_groups=32,
            scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        "text_encoder": CLIPTextModel(CLIPTextConfig(
            vocab_size=clip_vocab, hidden_size=sizes.clip_dim, intermediate_size=1024, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=77, bos_token_id=clip_vocab - 2,
            eos_token_id=clip_vocab - 1, pad_token_id=clip_vocab - 1)),
        "text_encoder_2": T5EncoderModel(T5Config(
            vocab_size=t5_vocab, d_model=sizes.t5_dim, d_ff=1024, d_kv=64, num_layers=4, num_heads=8,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False)),
    }
    for name, network in networks.items():
        network.to(torch.bfloat16).save_pretrained(folder / name)


def _save_tokenizers(folder: Path) -> tuple[int, int]:
    """Write ``tokenizer`` (CLIP) and ``tokenizer_2`` (T5) that know single letters; return their vocabulary sizes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer, T5TokenizerFast

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77).save_pretrained(folder / "tokenizer")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -5.0), *((chr(i), -6.0) for i in range(33, 127))]
    T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512).save_pretrained(folder / "tokenizer_2")
    return len(tokens), len(pieces)


def make_pictures(folder: Path, count: int = 20) -> None:
    """Write pictures of shapes, of several sizes and formats, and their ``metadata.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(7)
    rows = []
    for index in range(count):
        size = draw.choice([(640, 480), (512, 512), (600, 900), (1024, 768)])
        picture = Image.new("RGB", size, tuple(draw.randrange(256) for _ in range(3)))
        canvas = ImageDraw.Draw(picture)
        for _ in range(40):
            x, y, side = draw.randrange(size[0]), draw.randrange(size[1]), draw.randrange(10, 160)
            shape = draw.choice([canvas.ellipse, canvas.rectangle])
            shape((x, y, x + side, y + side), fill=tuple(draw.randrange(256) for _ in range(3)))
        name = f"{index:03d}.{'png' if index % 2 else 'jpg'}"
        picture.save(folder / name)
        rows.append((name, " ".join(draw.choices(WORDS, k=draw.randrange(8, 40)))))
    write_metadata(folder / "metadata.csv", rows)


def write_metadata(path: Path, rows: list[tuple[str, str]]) -> None:
    """Write a csv with the columns ``image`` and ``prompt``."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "prompt"])
        writer.writerows(rows)


def make_all(data: Path = DATA, num_csv_rows: int = 200_000) -> None:
    """Write whatever is not there yet. A finished folder carries a mark, so that an interrupted one is made again."""
    csv_folder = data / "csv"
    for folder, make in ((data / "flux", make_flux), (data / "pictures", make_pictures)):
        if not (folder / "made.json").exists():
            make(folder)
            (folder / "made.json").write_text(json.dumps({"torch": torch.__version__}), encoding="utf-8")
    if not (csv_folder / "metadata.csv").exists():
        csv_folder.mkdir(parents=True, exist_ok=True)
        draw = random.Random(7)
        names = [f"{index // 1000:03d}/{index:06d}.jpg" for index in range(num_csv_rows)]
        write_metadata(csv_folder / "metadata.csv", [(name, " ".join(draw.choices(WORDS, k=12))) for name in names])


if __name__ == "__main__":
    make_all()
