"""What the loss function saw: items, noise levels, losses, dtypes, for whoever watches.

A loss function calls ``report_losses`` and need not know whether anybody listens. Nothing is read from the device
until somebody asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from ..core import random


@dataclass(frozen=True)
class LossReport:
    """One call of a loss function."""

    items: tuple[int, ...]
    """Items of the batch, as they key its random numbers; empty outside ``random.keyed_items``."""
    timesteps: torch.Tensor
    """1000 * sigma of each sample, (B,), float32."""
    losses: torch.Tensor
    """Error of each sample before weighting, (B,), float32."""
    weights: torch.Tensor
    """Weight of each sample in the mean, (B,), float32."""
    dtypes: dict[str, torch.dtype]
    """Of the tensors that went in and came out."""


@dataclass
class BatchReport:
    """One forward pass: what its loss function reported, if it did, and the loss that came out."""

    loss: torch.Tensor
    reports: list[LossReport]


@dataclass
class StepReport:
    """The forward passes of one optimizer step on this process."""

    batches: list[BatchReport] = field(default_factory=list)
    pending: list[LossReport] = field(default_factory=list)
    """Reports of a forward pass that has not ended."""


_WATCHING: ContextVar[StepReport | None] = ContextVar("diffsynth_watch_losses", default=None)


@contextmanager
def watch_losses() -> Iterator[StepReport]:
    """Collect what is reported within this block; blocks inside one another each see their own."""
    report = StepReport()
    token = _WATCHING.set(report)
    try:
        yield report
    finally:
        _WATCHING.reset(token)


def report_losses(
    *, timesteps: torch.Tensor, losses: torch.Tensor, weights: torch.Tensor, **tensors: torch.Tensor
) -> None:
    """Tell who watches what a loss is made of; free when nobody does.

    Args:
        timesteps: 1000 * sigma, (B,), float32.
        losses: Error of each sample before weighting, (B,).
        weights: Weight of each sample, (B,).
        **tensors: Tensors whose dtype matters, by name (``latents``, ``noise_pred``).
    """
    watching = _WATCHING.get()
    if watching is not None:
        dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        watching.pending.append(LossReport(
            random.current_items(), timesteps.detach(), losses.detach(), weights.detach(), dtypes))


def report_batch(loss: torch.Tensor) -> None:
    """Tell who watches that a forward pass has ended with this loss, before any weighting by items."""
    watching = _WATCHING.get()
    if watching is not None:
        watching.batches.append(BatchReport(loss.detach(), watching.pending))
        watching.pending = []
