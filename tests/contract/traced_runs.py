"""Several trainings one after another in this process, with a record of what each forward pass saw.

Run as a script by each of the processes that train together: ``python traced_runs.py PLAN``, a JSON object of name ->
options, with the variables that torch.distributed reads in the environment.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import diffsynth.diffusion.runner as runner
from diffsynth.config import TrainConfig
from diffsynth.core.device import DTYPES
from diffsynth.diffusion.loss_report import report_losses, watch_losses
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.trainers.run import build_accelerator, check_run, launch, load_pipeline_class


class TracedModule(PipelineTrainingModule):
    """Notes items, timesteps and losses of each forward pass."""

    def __init__(self, pipe: Any, config: TrainConfig) -> None:
        super().__init__(pipe, config)
        self.passes: list[dict[str, Any]] = []

    def forward(self, data: dict[str, Any]) -> torch.Tensor:
        with watch_losses() as seen:
            loss = super().forward(data)
        (report,) = seen.pending
        report_losses(timesteps=report.timesteps, losses=report.losses, weights=report.weights)
        self.passes.append({
            "items": list(report.items), "timesteps": report.timesteps.tolist(), "losses": report.losses.tolist(),
            "dtype": str(report.timesteps.dtype)})
        return loss


def train_traced(options: Mapping[str, Any], trace: Path) -> None:
    """``diffsynth.trainers.run.train`` with a record in ``trace``, one file for each process."""
    config = TrainConfig(**options)
    family, configs, dataset = check_run(config)
    accelerator = build_accelerator(config)
    accelerator.wait_for_everyone()
    pipe = load_pipeline_class(family).from_pretrained(
        DTYPES[config.mixed_precision], accelerator.device, list(configs),
        deferred=[component.name for component in family.components])
    module = TracedModule(pipe, config)
    steps: list[dict[str, Any]] = []
    load = runner.load_windows

    def noted(*arguments: Any) -> Iterator[Any]:
        for window, batches in load(*arguments):
            steps.append({"window": window, "items": [batch.items for batch in batches],
                          "weights": [batch.weight for batch in batches]})
            yield window, batches

    runner.load_windows = noted
    try:
        launch(config, accelerator, dataset, module)
    finally:
        runner.load_windows = load
    trace.parent.mkdir(parents=True, exist_ok=True)
    path = trace.with_name(f"{trace.name}-{accelerator.process_index}.json")
    path.write_text(json.dumps({"steps": steps, "passes": module.passes}), encoding="utf-8")


def main() -> None:
    plan = Path(sys.argv[1])
    for name, options in json.loads(plan.read_text(encoding="utf-8")).items():
        train_traced(options, plan.parent / "traces" / name)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
