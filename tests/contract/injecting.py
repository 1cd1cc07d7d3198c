"""Runs that are spoiled on purpose, and runs of two processes."""

from __future__ import annotations

import copy
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch

from diffsynth.core import random
from diffsynth.diffusion.loss_report import report_losses, watch_losses
from diffsynth.diffusion.training_module import PipelineTrainingModule

from .forked import Forked
from .tiny import FamilyAtWork


class Injecting(PipelineTrainingModule):
    """Spoils the forward passes that ``inject`` names, by their number from 1, and notes what each of them saw."""

    def __init__(self, pipe: Any, config: Any, inject: dict[int, tuple[str, float]], rank: int | None = None) -> None:
        super().__init__(pipe, config)
        self.inject_at, self.passes = inject, []
        self.spoils = rank is None or rank == int(os.environ.get("RANK", "0"))

    def forward(self, data: Any) -> torch.Tensor:
        place, value = self.inject_at.get(len(self.passes) + 1, ("", 0.0)) if self.spoils else ("", 0.0)
        if place == "input":
            name = next(name for name, tensor in data.items() if isinstance(tensor, torch.Tensor))
            data = {**data, name: data[name].index_fill(0, torch.tensor(0), value)}
        with watch_losses() as seen:
            loss = super().forward(data)
        for report in seen.pending:
            report_losses(timesteps=report.timesteps, losses=report.losses, weights=report.weights,
                          latents=report.losses)
        self.passes.append((random.current_items(), seen.pending[0].timesteps.tolist()))
        if place == "gradient":
            loss.register_hook(lambda gradient: gradient * value)
        if place == "added":
            return loss + value  # a bad loss with good gradients
        return loss * value if place == "loss" else loss


def spoiled(family: FamilyAtWork, inject: dict[int, tuple[str, float]], rank: int | None = None) -> FamilyAtWork:
    """The family with a module that spoils some forward passes; ``modules`` lists those that were made."""
    other = copy.copy(family)
    other.modules = []

    def make(config: Any) -> Injecting:
        other.modules.append(Injecting(family.pipeline(deferred=True), config, inject, rank))
        return other.modules[-1]

    other.module = make
    return other


def on_two_processes(function: Callable[[], object]) -> list[Forked]:
    """Run a function in two processes that train together and log to their standard error; both have to succeed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])

    def aloud() -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
        function()

    processes = [
        Forked(aloud, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
               MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(2)]
    try:
        codes = [process.wait(timeout_s=90) for process in processes]
    finally:
        for process in processes:
            process.send(signal.SIGKILL)  # one that waits for the other for ever
    assert codes == [0, 0], "\n".join(process.said() for process in processes)
    return processes
