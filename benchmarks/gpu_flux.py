"""LoRA steps on a FLUX.1-dev-size transformer with random weights made on the GPU: peak memory and seconds per step.

``python benchmarks/gpu_flux.py`` needs a GPU of about 32 GB; ``--tiny`` shows on a CPU that the script works. The
forward pass is that of our training on a filled cache: neither text encoders nor autoencoder are in memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from make_models import FluxSizes, transformer_config
from measure import resident_peak_mb

from diffsynth import FluxImagePipeline
from diffsynth.config import TrainConfig
from diffsynth.core import random
from diffsynth.diffusion.training_module import PipelineTrainingModule

FLUX_DEV = FluxSizes(hidden=3072, num_double=19, num_single=38, t5_dim=4096, clip_dim=768)
TINY = FluxSizes(hidden=128, num_double=1, num_single=2, t5_dim=64, clip_dim=64)
NUM_WARMUP_STEPS = 5


def make_module(sizes: FluxSizes, device: torch.device, rank: int, checkpointing: bool) -> PipelineTrainingModule:
    """Our training of a pipeline of which only the transformer is there, bfloat16, with a LoRA in float32."""
    from diffusers import FluxTransformer2DModel

    pipe = FluxImagePipeline(device=device, torch_dtype=torch.bfloat16)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            torch.manual_seed(0)
            pipe.dit = FluxTransformer2DModel(**transformer_config(sizes))
    finally:
        torch.set_default_dtype(before)
    pipe.components_loaded()
    module = PipelineTrainingModule(pipe.requires_grad_(False), TrainConfig(
        lora_base_model="dit", lora_rank=rank, mixed_precision="bf16", use_gradient_checkpointing=checkpointing))
    module.prefix_cached = True
    return module


def make_inputs(sizes: FluxSizes, device: torch.device, side: int, num_text_tokens: int) -> dict[str, torch.Tensor]:
    """One cached item: latents and embeddings."""
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, device=device, dtype=torch.bfloat16)

    return dict(input_latents=draw(16, side // 8, side // 8), prompt_embeds=draw(num_text_tokens, sizes.t5_dim),
                pooled_prompt_embeds=draw(sizes.clip_dim))


def measure(options: argparse.Namespace, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Train for some steps and say what they cost."""
    sizes = TINY if options.tiny else FLUX_DEV
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    module = make_module(sizes, device, options.rank, not options.no_checkpointing)
    transformer = module.pipe.dit
    loaded_gb = torch.cuda.memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    if compiled:
        # block by block: one graph per kind of block, compiled once, and checkpointing stays outside of it
        transformer.compile_repeated_blocks()
    parameters = list(module.trainable_parameters().values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    inputs = make_inputs(sizes, device, options.side, options.text_tokens)
    seconds = []
    for step in range(NUM_WARMUP_STEPS + options.steps):
        started_s = time.perf_counter()
        with random.keyed_items(0, step, [0]), torch.autocast(device.type, torch.bfloat16):
            loss = module(inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the GPU
        seconds.append(time.perf_counter() - started_s)
    peak_gb = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else resident_peak_mb() / 1e3
    reserved_gb = torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else peak_gb
    return dict(
        compiled=compiled, step_s=round(median(seconds[NUM_WARMUP_STEPS:]), 4), first_step_s=round(seconds[0], 1),
        peak_gb=round(peak_gb, 2), reserved_gb=round(reserved_gb, 2), loaded_gb=round(loaded_gb, 2),
        num_parameters=sum(p.numel() for p in transformer.parameters()),
        num_trainable=sum(p.numel() for p in parameters), loss=loss.item(),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="A transformer of three small blocks, for the CPU.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--side", type=int, default=1024, help="Height and width in pixels.")
    parser.add_argument("--text_tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20, help=f"Counted steps, after {NUM_WARMUP_STEPS} that are not.")
    parser.add_argument("--no_checkpointing", action="store_true", help="Keep all activations: faster, more memory.")
    parser.add_argument("--compile", choices=("both", "no", "yes"), default="both")
    parser.add_argument("--output", type=Path, help="Also write the results to this JSON file.")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu" and not options.tiny:
        parser.error("there is no GPU here; --tiny runs the same steps on a small transformer.")
    results = []
    for compiled in {"both": (False, True), "no": (False,), "yes": (True,)}[options.compile]:
        results.append(measure(options, device, compiled))
        print(json.dumps(results[-1]), flush=True)
    if options.output is not None:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        document = dict(device=name, torch=torch.__version__, results=results)
        options.output.write_text(json.dumps(document, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
