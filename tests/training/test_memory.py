"""What only the cache needs is not in memory while training; measured on real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.pictures import make_dataset

SCRIPT = """
import json, sys
from pathlib import Path
import diffsynth.diffusion.runner as runner
from tests.training_run import train_tiny

def megabytes(field):
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

real, during = runner.clip_gradients, []

def clip_and_measure(task):
    during.append(megabytes("VmRSS"))
    return real(task)

runner.clip_gradients = clip_and_measure
flux, data, out = map(Path, sys.argv[1:])
train_tiny(flux, data, out, cache_path=str(data.parent / "cache"), max_sequence_length=8)
print(json.dumps({"during training": max(during), "peak": megabytes("VmHWM")}))
"""


def run(flux: Path, data: Path, out: Path) -> dict[str, float]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(flux), str(data), str(out)], env=env, capture_output=True, text=True,
        check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def test_text_encoders_are_not_in_memory_while_training(tmp_path):
    from transformers import T5Config, T5EncoderModel

    from tests.tiny_flux import build_pipeline, save_original_layout

    pipe = build_pipeline(tmp_path / "tokenizers")
    vocabulary = pipe.text_encoder_2.config.vocab_size
    pipe.text_encoder_2 = T5EncoderModel(T5Config(
        vocab_size=vocabulary, d_model=64, d_ff=420_000, d_kv=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False))
    weights = sum(p.numel() * p.element_size() for p in pipe.text_encoder_2.parameters()) / 2**20
    assert weights > 300
    flux = save_original_layout(pipe, tmp_path / "FLUX.1-dev", shard_t5=False)
    del pipe
    torch.manual_seed(0)
    data = make_dataset(tmp_path / "pictures", count=2)
    filling = run(flux, data, tmp_path / "first")
    filled = run(flux, data, tmp_path / "second")
    # the first run has them while it encodes, and gives them back before the first step
    assert filling["peak"] > filling["during training"] + 0.9 * weights
    # the second run has nothing to encode and never reads them
    assert filled["peak"] < filling["peak"] - 0.9 * weights
