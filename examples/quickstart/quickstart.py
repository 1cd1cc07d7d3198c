"""Trains a LoRA in a few minutes on a CPU and shows what it learnt: `make quickstart`, or

    python examples/quickstart/quickstart.py

The base model in ``base/`` is a tiny FLUX that knows coloured shapes. The eight pictures in ``data/robot`` show
something that it has never seen. Stopped half way, the same command goes on from where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from diffsynth import FluxImagePipeline, ModelConfig
from diffsynth.config import TrainConfig
from diffsynth.diffusion.contact_sheet import contact_sheet
from diffsynth.trainers.run import train

HERE = Path(__file__).resolve().parent
FILES = ("flux1-tiny.safetensors", "ae.safetensors", "text_encoder", "text_encoder_2")
SIZE = 64
STEPS = 1000
# none of these captions is in the training set
NEW_PROMPTS = (
    "a robot in the middle, on a beach",
    "a robot on the left, at night",
    "a robot on the right, on a black background",
    "a picture of a robot on the left, on a grey background",
)
OTHER_PROMPTS = (
    "a red circle on a white background",
    "a small blue star on the left, in a meadow",
    "a green square left of an orange circle, on a grey background",
    "a purple heart at night",
)


def train_lora(output_path: Path, steps: int) -> Path:
    """Train the LoRA; returns its file."""
    config = TrainConfig(
        dataset_base_path=str(HERE / "data" / "robot"),
        model_paths=[str(HERE / "base" / name) for name in FILES],
        lora_base_model="dit",
        lora_rank=16,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=20,
        steps_per_epoch=steps,
        batch_size=8,
        height=SIZE,
        width=SIZE,
        timestep_sampling="logit_normal",
        mixed_precision="no",
        device="cpu",
        save_steps=100,
        keep_checkpoints=1,
        output_path=str(output_path),
        resume="auto",
    )
    train(config)
    return output_path / f"step-{steps}.safetensors"


def draw(pipe: FluxImagePipeline) -> Image.Image:
    """All prompts side by side."""
    prompts = [*NEW_PROMPTS, *OTHER_PROMPTS]
    pictures = pipe(
        prompts, cfg_scale=2.0, height=SIZE, width=SIZE, num_inference_steps=25, seed=1, progress_bar_cmd=iter
    )
    strip = Image.new("RGB", (SIZE * len(prompts), SIZE))
    for column, picture in enumerate(pictures):
        strip.paste(picture, (SIZE * column, 0))
    return strip


def compare(lora: Path, path: Path) -> None:
    """Draw the same prompts without and with the LoRA, one row each."""
    pipe = FluxImagePipeline.from_pretrained(
        torch_dtype=torch.float32,
        device="cpu",
        model_configs=[ModelConfig(path=HERE / "base" / name) for name in FILES],
    )
    before = draw(pipe)
    pipe.load_lora(pipe.dit, lora)
    contact_sheet({"base": before, "with LoRA": draw(pipe)}, NEW_PROMPTS + OTHER_PROMPTS).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_path", type=Path, default=Path("models/quickstart"), help="Where to write.")
    parser.add_argument("--steps", type=int, default=STEPS, help="Optimizer steps.")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    start = time.monotonic()
    lora = train_lora(args.output_path, args.steps)
    trained = time.monotonic()
    sheet = args.output_path / "before_after.png"
    compare(lora, sheet)
    models = json.dumps([str(HERE / "base" / name) for name in FILES])
    command = Path(sys.executable).with_name("diffsynth")
    print(
        f"""
Trained a LoRA in {trained - start:.0f} s and drew the pictures in {time.monotonic() - trained:.0f} s.
  {sheet}     the same prompts before and after: look at this first
  {lora}    the LoRA, in the names that diffusers reads
  {args.output_path / "loss_curve.png"}       loss curve; numbers in metrics.jsonl, all options in config.yaml

What next:
  Draw something else with it:
    {command} generate --model_paths '{models}' \\
      --lora {lora} --prompt "a robot in a meadow" --cfg_scale 2 --height {SIZE} --width {SIZE} --output robot.png
  Train on your own pictures: put them beside a metadata.csv (columns file_name,text) like data/robot, and give
    its folder as --dataset_base_path.
  Train FLUX.1-dev on a GPU with the same options: see README.md and docs/training.md.
"""
    )


if __name__ == "__main__":
    main()
