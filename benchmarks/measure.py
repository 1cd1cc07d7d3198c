"""One measured run in a process of its own: ``python measure.py CASE_JSON RESULT_PATH``.

The end of every optimizer step is seen through torch's global hook, so that any trainer can be measured without its
knowing. Times are CPU seconds of the process: on a shared machine, wall time says more about the neighbours.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

NUM_WARMUP_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is run."""

    contestant: str
    """A module beside this file with a function ``run(case)``: ``floor``, ``ours``, ``csv_floor``, ``csv_ours``."""
    output: str = ""
    """Folder for what the run writes."""
    resolution: int = 256
    batch_size: int = 1
    num_steps: int = 23
    use_gradient_checkpointing: bool = False
    lora_rank: int = 16
    num_text_tokens: int = 128
    """T5 tokens: 128 beside 256 image tokens."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured. Times in CPU seconds, memory in MB."""

    step_s: float | None
    """Median over the optimizer steps, the first ones left out."""
    mean_step_s: float | None
    """Mean over the same steps: logging and checkpoints that not every step has are in it."""
    num_steps: int
    first_step_s: float | None
    """From the start of the process to the end of the first optimizer step."""
    total_s: float
    steps_peak_mb: float | None
    """Most memory that was resident until the end of the last step."""
    peak_mb: float
    """Most memory that was resident until the end."""
    num_trainable: int
    trainable_dtypes: list[str]
    extra: dict[str, Any]


class StepMeter:
    """Process times at the end of every optimizer step."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.peak_mb: float | None = None
        self.num_trainable = 0
        self.dtypes: list[str] = []
        self.extra: dict[str, Any] = {}

    def install(self) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        register_optimizer_step_post_hook(self._step_ended)

    def _step_ended(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.times_s.append(time.process_time())
        self.peak_mb = resident_peak_mb()
        if len(self.times_s) == 1:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.num_trainable = sum(p.numel() for p in parameters)
            self.dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})

    def result(self) -> Result:
        steps = [after - before for before, after in zip(self.times_s, self.times_s[1:], strict=False)]
        counted = steps[NUM_WARMUP_STEPS - 1 :]
        return Result(
            step_s=median(counted) if counted else None, mean_step_s=mean(counted) if counted else None,
            num_steps=len(self.times_s), first_step_s=self.times_s[0] if self.times_s else None,
            total_s=time.process_time(), steps_peak_mb=self.peak_mb, peak_mb=resident_peak_mb(),
            num_trainable=self.num_trainable, trainable_dtypes=self.dtypes, extra=self.extra,
        )


METER = StepMeter()


def resident_peak_mb() -> float:
    """Most memory that this process ever had resident (VmHWM)."""
    return _status_mb("VmHWM")


def resident_mb() -> float:
    """Memory that this process has resident now (VmRSS)."""
    return _status_mb("VmRSS")


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux only.")


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    if not case.contestant.startswith("csv"):
        import torch

        torch.set_num_threads(1)
        METER.install()
    importlib.import_module(case.contestant).run(case)
    Path(sys.argv[2]).write_text(json.dumps(asdict(METER.result()), indent=1), encoding="utf-8")


if __name__ == "__main__":
    # the contestants import METER from "measure", which must be this module and not a second copy of it
    sys.modules["measure"] = sys.modules["__main__"]
    main()
