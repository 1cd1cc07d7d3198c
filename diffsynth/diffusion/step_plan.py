"""Which items every optimizer step of every epoch sees, worked out before training starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ..core.data.batching import plan_epoch, split_window
from ..core.errors import UserError
from ..core.random import keyed_generator


@dataclass(frozen=True)
class Request:
    """An item as one epoch sees it."""

    item: int
    """Index that keys the item's random numbers; beyond the data set's length when an epoch goes round again."""
    epoch: int


class StepPlan:
    """The windows (items of one optimizer step) of each epoch, and this process's micro-batches of them.

    Args:
        buckets: Bucket of every item; only items of one bucket can share a micro-batch.
        batch_size: Items per process in one forward pass.
        accumulation_steps: Forward passes per optimizer step.
        num_processes: Processes that train together.
        rank: Index of this one.
        seed: Seed of the shuffle.
        steps_per_epoch: Go round the data set until this many steps are reached; None is once through.
    """

    def __init__(
        self, buckets: Sequence[Any], *, batch_size: int, accumulation_steps: int, num_processes: int, rank: int,
        seed: int, steps_per_epoch: int | None = None,
    ) -> None:
        if not buckets:
            raise UserError("the data set is empty.")
        self.buckets = buckets
        self.batch_size = batch_size
        self.step_size = batch_size * accumulation_steps * num_processes
        self.num_processes, self.rank, self.seed = num_processes, rank, seed
        self.steps_per_epoch = steps_per_epoch or len(self._pass(0, 0))

    def windows(self, epoch: int) -> list[list[int]]:
        """Item indices of each optimizer step of an epoch."""
        windows: list[list[int]] = []
        round_trip = 0
        while len(windows) < self.steps_per_epoch:
            offset = round_trip * len(self.buckets)
            windows += [[offset + item for item in window] for window in self._pass(epoch, round_trip)]
            round_trip += 1
        return windows[: self.steps_per_epoch]

    def micro_batches(self, window: list[int]) -> list[list[int]]:
        """This process's share of a window; an empty list is a forward pass that only other processes make."""
        count = len(self.buckets)
        size = {item: self.buckets[item % count] for item in window}
        local = split_window(window, size, self.batch_size, self.num_processes, self.rank)  # type: ignore[arg-type]
        return [list(items) for items in local]

    def _pass(self, epoch: int, round_trip: int) -> list[list[int]]:
        # an epoch of several rounds shuffles each of them differently
        key = epoch if round_trip == 0 else f"{epoch}.{round_trip}"
        return plan_epoch(self.buckets, self.step_size, self.seed, key)  # type: ignore[arg-type]


class RequestedItems(Dataset):
    """The data set as the loader's workers see it: items by request, augmentation and caption dropout included."""

    def __init__(self, dataset: Any, seed: int, caption_dropout: float) -> None:
        self.dataset, self.seed, self.caption_dropout = dataset, seed, caption_dropout

    def __getitem__(self, request: Request) -> dict[str, Any]:
        drop = self.caption_dropout > 0 and self._draw(request) < self.caption_dropout
        if not hasattr(self.dataset, "variant"):
            return self.dataset[request.item % len(self.dataset)]
        variant = self.dataset.variant(request.item, request.epoch)
        if hasattr(self.dataset, "store"):
            return self.dataset.load(request.item, variant, drop_caption=drop)
        data = self.dataset.load(request.item % len(self.dataset), variant)
        return {**data, "prompt": ""} if drop else data

    def _draw(self, request: Request) -> float:
        import torch

        generator = keyed_generator(self.seed, request.epoch, request.item, "caption_dropout")
        return torch.rand((), generator=generator).item()


class _MicroBatchSampler:
    """Batch sampler over fixed micro-batches of one epoch."""

    def __init__(self, micro_batches: list[list[Request]]) -> None:
        self.micro_batches = micro_batches

    def __iter__(self) -> Iterator[list[Request]]:
        return iter(self.micro_batches)

    def __len__(self) -> int:
        return len(self.micro_batches)


@dataclass(frozen=True)
class MicroBatch:
    """Data of one forward pass."""

    items: list[int]
    """Empty on a process that has nothing left of this window; ``data`` is then another item, to be given no weight."""
    weight: float
    """Share of the window's items."""
    data: Any


def load_windows(
    dataset: RequestedItems, plan: StepPlan, epoch: int, first: int, collate: Any, num_workers: int
) -> Iterator[tuple[list[int], list[MicroBatch]]]:
    """Items and loaded micro-batches of each optimizer step of an epoch, from step ``first`` of it on."""
    windows = plan.windows(epoch)[first:]
    shares = [plan.micro_batches(window) for window in windows]
    # an idle process still makes a forward and a backward pass, so that the others do not wait for its gradients
    requests = [
        [Request(item, epoch) for item in items or window[:1]]
        for window, share in zip(windows, shares, strict=True) for items in share
    ]
    loader = iter(DataLoader(
        dataset, batch_sampler=_MicroBatchSampler(requests), collate_fn=collate, num_workers=num_workers,
    ))
    for window, share in zip(windows, shares, strict=True):
        yield window, [MicroBatch(items, len(items) / len(window), _next(loader)) for items in share]


def _next(loader: Iterator[Any]) -> Any:
    try:
        return next(loader)
    except UserError as error:
        # a worker process sends its whole traceback as the message; its last line is ours
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
