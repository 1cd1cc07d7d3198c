"""What a save costs the training loop, in the background against plain, in milliseconds and as a share of a step.

    python benchmarks/save_stall.py --rounds 3

A small FLUX is trained in full on the CPU, one compute thread (36 M parameters: 440 MB of training state and 150 MB of
weights in each save). The two ways take turns, each run in a process of its own. The stall is the time that the
training thread spends in a save: wall time, and the processor time of that thread, which busy neighbours change less.
What the writing takes from the steps after it shows in the whole cost: how much longer the steps from one save to the
next took than as many of the steps at the end of that stretch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from make_models import DATA, FluxSizes, make_flux, make_pictures

SIZES = FluxSizes(hidden=512, num_double=2, num_single=4, t5_dim=256, clip_dim=256)
FLUX = DATA / "flux_for_saves"
PICTURES = DATA / "pictures"
EVERY, NUM_SAVES = 10, 4
RESULTS = Path(__file__).parent / "results" / "save_stall.json"


def measure(in_background: bool) -> dict[str, Any]:
    """Train once in this process and time steps and saves."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from diffsynth.config import TrainConfig
    from diffsynth.diffusion.task import TrainingTask
    from diffsynth.trainers.run import train

    torch.set_num_threads(1)
    steps, saves, busy, real = [], [], [], TrainingTask.save
    register_optimizer_step_post_hook(lambda *_: steps.append(time.monotonic()))

    def timed(task: TrainingTask, epoch: int | None) -> None:
        started, processor = time.monotonic(), time.thread_time()
        real(task, epoch)
        saves.append(time.monotonic() - started)
        busy.append(time.thread_time() - processor)

    TrainingTask.save = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory(dir=DATA) as output:
        train(TrainConfig(
            model_paths=[str(FLUX / name) for name in ("transformer", "vae", "text_encoder", "text_encoder_2")],
            tokenizer_path=str(FLUX), dataset_base_path=str(PICTURES),
            dataset_metadata_path=str(PICTURES / "metadata.csv"), data_file_keys="image", height=128, width=128,
            max_sequence_length=64, trainable_models="dit", learning_rate=1e-5, device="cpu", mixed_precision="no",
            max_steps=EVERY * (NUM_SAVES + 1), num_epochs=1000, save_steps=EVERY, keep_checkpoints=1,
            save_in_background=in_background, output_path=output, cache_path=str(DATA / "cache" / "saves"),
        ))
        state = next((Path(output) / "state").glob("step-*"))
        size_mb = sum(path.stat().st_size for path in state.iterdir()) / 1e6
    # from the second step on; the last save has no steps after it
    lengths = [after - before for before, after in itertools.pairwise(steps)]
    intervals = [lengths[first - 1 : first - 1 + EVERY] for first in range(EVERY, EVERY * NUM_SAVES + 1, EVERY)]
    # the later half of an interval is past the writing, and has the same neighbours on the machine as the earlier half
    quiet = [median(interval[EVERY // 2 :]) for interval in intervals]
    return {
        "step_ms": 1000 * median(quiet), "stall_ms": 1000 * median(saves[:-1]),
        "stall_cpu_ms": 1000 * median(busy[:-1]), "stalls_ms": [1000 * save for save in saves],
        "whole_ms": 1000 * median(
            sum(interval) - EVERY * step for interval, step in zip(intervals, quiet, strict=True)),
        "state_mb": size_mb,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=("background", "plain"))
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child == "background")))
        return
    if not (FLUX / "transformer").exists():
        make_flux(FLUX, SIZES)
    if not PICTURES.exists():
        make_pictures(PICTURES)
    runs: dict[str, list[dict[str, Any]]] = {"background": [], "plain": []}
    for _ in range(args.rounds):
        for mode, measured in runs.items():
            finished = subprocess.run(
                [sys.executable, __file__, "--child", mode], capture_output=True, text=True, check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"})
            measured.append(json.loads(finished.stdout.splitlines()[-1]))
    columns = ("step_ms", "stall_ms", "stall_cpu_ms", "whole_ms", "state_mb")
    table = {mode: {name: median(run[name] for run in measured) for name in columns}
             for mode, measured in runs.items()}
    print(f"{'':<12}" + "".join(f"{name:>14}" for name in columns) + f"{'stall / step':>14}")
    for mode, row in table.items():
        print(f"{mode:<12}" + "".join(f"{row[name]:>14.1f}" for name in columns)
              + f"{row['stall_ms'] / row['step_ms']:>14.1%}")
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"median": table, "runs": runs}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
