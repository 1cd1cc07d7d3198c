"""Makes the quickstart's base model from a seed: a tiny FLUX that draws coloured shapes, trained on its own drawings.

    python examples/quickstart/make_base.py --work_path /tmp/quickstart_base --output_path examples/quickstart/base

Four parts, each of which is skipped when its result is in the work folder: text encoders, autoencoder, transformer,
model card. The autoencoder and the transformer go through the same training loop as any user's model.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from autoencoder import train_autoencoder
from PIL import Image
from safetensors.torch import load_file
from scenes import SIZE, example
from text_encoders import WIDTH, make_text_encoders
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffsynth import FluxImagePipeline, ModelConfig, load_component
from diffsynth.config import TrainConfig
from diffsynth.diffusion.contact_sheet import contact_sheet
from diffsynth.models.autoencoder_kl import FLUX_VAE
from diffsynth.models.clip import CLIP_L
from diffsynth.models.loading import save_component
from diffsynth.models.t5 import T5_XXL
from diffsynth.pipelines.flux_components import FLUX_DIT
from diffsynth.trainers.run import train

FILES = (
    "flux1-tiny.safetensors", "ae.safetensors", "text_encoder/model.safetensors", "text_encoder_2/model.safetensors",
)  # fmt: skip
HEADS, HEAD_DIM, DOUBLE_BLOCKS, SINGLE_BLOCKS = 3, 64, 2, 4
SHEET = (
    ("a red circle on a white background", "a big blue star on the left, in a meadow",
     "a small yellow heart at the top, at night", "a purple triangle on a beach",
     "a green square left of an orange circle, on a grey background",
     "a white star above a red heart, on a black background"),
    ("a yellow triangle right of a blue circle, on a pink background",
     "a big orange heart at the bottom, on a white background", "a white square on the right, at night",
     "a small green circle at the bottom, on a beach",
     "a red star on the left and a purple square on the right, in a meadow",
     "a blue heart below a yellow square, on a grey background"),
)  # fmt: skip


def build_transformer() -> torch.nn.Module:
    """FLUX's transformer with random weights: 5 million parameters, no guidance input."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=DOUBLE_BLOCKS,
        num_single_layers=SINGLE_BLOCKS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 28, 28),
    )


def write_text_encoders(work: Path, seed: int) -> None:
    clip, t5, _ = make_text_encoders(work, steps=1300, seed=seed)
    for module, name, spec in ((clip, "text_encoder", CLIP_L), (t5, "text_encoder_2", T5_XXL)):
        save_component(module, work / name / "model.safetensors", spec)
        module.config.architectures = [type(module).__name__]
        module.config.save_pretrained(work / name)


def write_autoencoder(work: Path, steps: int, seed: int) -> None:
    autoencoder = train_autoencoder(work / "train_autoencoder", steps, seed)
    save_component(autoencoder, work / "ae.safetensors", FLUX_VAE)


def write_pictures(folder: Path, count: int, seed: int) -> None:
    """The training set: ``count`` pictures with a ``metadata.csv`` of columns image and prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "prompt"))
        for index in range(count):
            picture, caption = example(index, seed)
            picture.save(folder / f"{index:05d}.png")
            rows.writerow((f"{index:05d}.png", caption))


def write_transformer(work: Path, pictures: int, steps: int, seed: int, resume: str) -> None:
    """Full training of the transformer, as ``diffsynth train`` does it."""
    if not (work / "data" / "metadata.csv").exists():
        write_pictures(work / "data", pictures, seed)
    start = work / "start.safetensors"
    if not start.exists():
        torch.manual_seed(seed)
        save_component(build_transformer(), start, FLUX_DIT)
    config = TrainConfig(
        dataset_base_path=str(work / "data"),
        model_paths=[str(start), *(str(work / name) for name in FILES[1:])],
        trainable_models=["dit"],
        height=SIZE,
        width=SIZE,
        batch_size=16,
        num_epochs=10**6,
        max_steps=steps,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=300,
        optimizer_args={"betas": [0.9, 0.99], "fused": True},
        timestep_sampling="logit_normal",
        caption_dropout=0.1,
        mixed_precision="bf16",
        save_steps=250,
        keep_checkpoints=1,
        sample_prompts=[*SHEET[0]],
        sample_every=1000,
        sample_steps=20,
        sample_cfg_scale=2.0,
        output_path=str(work / "train_transformer"),
        seed=seed,
        resume=resume,
    )
    # on a CPU, the plain attention is a fifth faster than the fused one at these sizes
    with sdpa_kernel([SDPBackend.MATH]):
        train(config)
    # the state holds the weights in float32, the exported file in the precision of the run
    state = max((work / "train_transformer" / "state").glob("step-*"), key=lambda path: int(path.name[5:]))
    weights = load_file(state / "weights.safetensors")
    transformer = build_transformer()
    transformer.load_state_dict({name.removeprefix("pipe.dit."): tensor for name, tensor in weights.items()})
    save_component(transformer, work / FILES[0], FLUX_DIT)


def export(work: Path, output: Path) -> None:
    """Copy everything that a user needs, the weights in float16."""
    for name, spec in zip(FILES, (FLUX_DIT, FLUX_VAE, CLIP_L, T5_XXL), strict=True):
        save_component(load_component(work / name), output / name, spec, torch_dtype=torch.float16)
    for source in (*work.glob("tokenizer*/*"), *work.glob("text_encoder*/*.json")):
        target = output / source.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())


def load_base(folder: Path) -> FluxImagePipeline:
    """The finished base model in float32."""
    return FluxImagePipeline.from_pretrained(
        torch_dtype=torch.float32, device="cpu", model_configs=[ModelConfig(path=folder / name) for name in FILES]
    )


def draw_sheet(folder: Path) -> Image.Image:
    """Two rows of pictures, drawn by the exported model."""
    pipe = load_base(folder)
    sheets = []
    for row, prompts in enumerate(SHEET):
        pictures = pipe(list(prompts), cfg_scale=2.0, height=SIZE, width=SIZE, num_inference_steps=25, seed=row)
        strip = Image.new("RGB", (SIZE * len(pictures), SIZE))
        for column, picture in enumerate(pictures):
            strip.paste(picture, (SIZE * column, 0))
        sheets.append(contact_sheet({"": strip}, prompts))
    sheet = Image.new("RGB", (sheets[0].width, sum(part.height for part in sheets)), "white")
    for number, part in enumerate(sheets):
        sheet.paste(part, (0, number * sheets[0].height))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_path", type=Path, default=Path("quickstart_base"), help="Folder in between.")
    parser.add_argument("--output_path", type=Path, default=Path(__file__).parent / "base", help="The finished model.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoencoder_steps", type=int, default=8000)
    parser.add_argument("--pictures", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=11000, help="Optimizer steps of the transformer.")
    parser.add_argument("--resume", default="auto", help="never, auto, or a state folder of the transformer's run.")
    args = parser.parse_args()
    work: Path = args.work_path
    work.mkdir(parents=True, exist_ok=True)
    timed = work / "seconds.json"
    seconds = json.loads(timed.read_text(encoding="utf-8")) if timed.exists() else {}

    def part(name: str, result: str, make: Callable[[], None]) -> None:
        if (work / result).exists():
            return
        start = time.monotonic()
        make()
        seconds[name] = seconds.get(name, 0) + round(time.monotonic() - start)
        (work / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")

    part("text encoders", "text_encoder_2/model.safetensors", lambda: write_text_encoders(work, args.seed))
    part("autoencoder", "ae.safetensors", lambda: write_autoencoder(work, args.autoencoder_steps, args.seed))
    part("transformer", FILES[0],
         lambda: write_transformer(work, args.pictures, args.steps, args.seed, args.resume))
    export(work, args.output_path)
    draw_sheet(args.output_path).save(args.output_path / "sample_sheet.png")
    size = sum(path.stat().st_size for path in args.output_path.rglob("*") if path.is_file())
    print(f"{args.output_path}: {size / 1e6:.1f} MB; seconds per part: {seconds}")


if __name__ == "__main__":
    main()
