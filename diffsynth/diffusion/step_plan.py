"""Which items every optimizer step of every epoch sees, worked out before training starts."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader, Dataset

from ..core.data.batching import plan_epoch, split_window
from ..core.data.rows import BadRow, BadRowError
from ..core.errors import RunStopped, UserError
from ..core.random import keyed_generator
from .checkpoint import Progress


@dataclass(frozen=True)
class Request:
    """An item as one epoch sees it."""

    item: int
    """Index that keys the item's random numbers; beyond the data set's length when an epoch goes round again."""
    epoch: int


@dataclass(frozen=True)
class LostItem:
    """An item that could be loaded when the run began and cannot be any more."""

    item: int
    bad_row: BadRow


class Buckets(Sequence):
    """Which items of a data set can share a forward pass; asked for when a step of several items needs it."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._values: list[Any] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: Any) -> Any:
        if not hasattr(self.dataset, "bucket"):
            return None
        if self._values is None:
            self._values = [self.dataset.bucket(item) for item in range(len(self.dataset))]
        return self._values[item]


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
        if not len(buckets):
            raise UserError("the data set is empty.")
        self.buckets = buckets
        self.batch_size = batch_size
        self.step_size = batch_size * accumulation_steps * num_processes
        self.num_processes, self.rank, self.seed = num_processes, rank, seed
        self._steps_asked_for = steps_per_epoch
        self._continued: tuple[int, list[list[int]]] | None = None
        """An epoch with steps of several sizes, and its windows."""
        self.steps_per_epoch = steps_per_epoch or len(self._windows(0, ()))

    def windows(self, epoch: int) -> list[list[int]]:
        """Item indices of each optimizer step of an epoch."""
        if self._continued is not None and self._continued[0] == epoch:
            return self._continued[1]
        return self._windows(epoch, ())

    def continue_epoch(self, epoch: int, parts: Sequence[tuple[int, int]]) -> None:
        """Plan the rest of an epoch around what was done of it with steps of other sizes.

        Args:
            epoch: Index of the epoch.
            parts: Items per step and number of steps, in the order in which they were done. What they used up is
                taken out, and the rest is cut into steps of this plan's own size.
        """
        self._continued = (epoch, self._windows(epoch, parts)) if parts else None

    def steps_in(self, epoch: int) -> int:
        """Optimizer steps of an epoch."""
        if self._continued is not None and self._continued[0] == epoch:
            return len(self._continued[1])
        return self.steps_per_epoch

    def total_steps(self, progress: Progress, num_epochs: int) -> int:
        """Optimizer steps of the whole run: those done, the rest of this epoch, and the epochs after it.

        A run that is told to be shorter than it is already has fewer steps than were done.
        """
        before = progress.step - progress.step_in_epoch
        if progress.epoch >= num_epochs:
            return before - (progress.epoch - num_epochs) * self.steps_per_epoch
        return before + self.steps_in(progress.epoch) + (num_epochs - progress.epoch - 1) * self.steps_per_epoch

    def micro_batches(self, window: list[int]) -> list[list[int]]:
        """This process's share of a window; an empty list is a forward pass that only other processes make."""
        count = len(self.buckets)
        buckets = {item: self.buckets[item % count] if len(window) > 1 else None for item in window}
        local = split_window(window, buckets, self.batch_size, self.num_processes, self.rank)  # type: ignore[arg-type]
        return [list(items) for items in local]

    def _windows(self, epoch: int, parts: Sequence[tuple[int, int]]) -> list[list[int]]:
        windows: list[list[int]] = []
        everything = list(range(len(self.buckets)))
        # a round is one pass through the data; what is left of it is cut anew whenever the size of a step changes
        round_trip, left, num_cuts = 0, everything, 0
        for step_size, num_steps in (*parts, (self.step_size, None)):
            wanted = num_steps
            while wanted != 0:
                if num_steps is None:
                    wanted = None if self._steps_asked_for is None else self._steps_asked_for - len(windows)
                    if wanted == 0 or (wanted is None and round_trip > 0):
                        break
                cut = self._cut(left, step_size, self._key(epoch, round_trip, num_cuts))
                offset = round_trip * len(everything)
                taken, kept = cut[:wanted], cut[len(cut[:wanted]):]
                windows += [[offset + item for item in window] for window in taken]
                wanted = None if wanted is None else wanted - len(taken)
                if kept:
                    left, num_cuts = sorted(item for window in kept for item in window), num_cuts + 1
                else:
                    round_trip, left, num_cuts = round_trip + 1, everything, 0
        return windows

    def _cut(self, items: list[int], step_size: int, key: int | str) -> list[list[int]]:
        # a step of one item asks no bucket, so that one process need not know them
        buckets = [self.buckets[item] if step_size > 1 else None for item in items]
        cut = plan_epoch(buckets, step_size, self.seed, key)  # type: ignore[arg-type]
        return [[items[index] for index in window] for window in cut]

    @staticmethod
    def _key(epoch: int, round_trip: int, num_cuts: int) -> int | str:
        # an epoch of several rounds shuffles each of them differently
        key = epoch if round_trip == 0 else f"{epoch}.{round_trip}"
        return key if num_cuts == 0 else f"{key} rest {num_cuts}"


class RequestedItems(Dataset):
    """The data set as the loader's workers see it: items by request, augmentation and caption dropout included."""

    def __init__(self, dataset: Any, seed: int, caption_dropout: float, skip_bad: bool = False) -> None:
        self.dataset, self.seed, self.caption_dropout, self.skip_bad = dataset, seed, caption_dropout, skip_bad

    def __getitem__(self, request: Request) -> dict[str, Any] | LostItem:
        """The sample; with ``skip_bad``, a ``LostItem`` where it cannot be loaded."""
        try:
            return self.load(request)
        except BadRowError as error:
            if not self.skip_bad or error.bad_row is None:
                raise
            return LostItem(request.item, error.bad_row)

    def load(self, request: Request) -> dict[str, Any]:
        """The sample."""
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
    lost: tuple[LostItem, ...] = ()
    """Items of the window that could not be loaded; they are not among ``items``."""


def load_windows(
    dataset: RequestedItems, plan: StepPlan, epoch: int, first: int, collate: Any, num_workers: int
) -> Iterator[tuple[list[int], list[MicroBatch]]]:
    """Items and loaded micro-batches of each optimizer step of an epoch, from step ``first`` of it on.

    Raises:
        UserError: an item cannot be loaded, and bad items are not to be skipped.
        RunStopped: no item can be loaded any more.
    """
    windows = plan.windows(epoch)[first:]
    shares = [plan.micro_batches(window) for window in windows]
    # an idle process still makes a forward and a backward pass, so that the others do not wait for its gradients
    requests = [
        [Request(item, epoch) for item in items or window[:1]]
        for window, share in zip(windows, shares, strict=True) for items in share
    ]
    loader = iter(DataLoader(
        dataset, batch_sampler=_MicroBatchSampler(requests), collate_fn=_CollateLoaded(collate),
        num_workers=num_workers, worker_init_fn=_leave_signals_to_the_training_process,
    ))
    for window, share in zip(windows, shares, strict=True):
        yield window, [_micro_batch(dataset, collate, window, epoch, items, _next(loader)) for items in share]


@dataclass(frozen=True)
class _CollateLoaded:
    """What was lost of a micro-batch, and a batch of the rest; sent to the loader's workers."""

    collate: Any

    def __call__(self, samples: list[Any]) -> tuple[list[LostItem], Any]:
        loaded = [sample for sample in samples if not isinstance(sample, LostItem)]
        lost = [sample for sample in samples if isinstance(sample, LostItem)]
        return lost, self.collate(loaded) if loaded else None


def _micro_batch(
    dataset: RequestedItems, collate: Any, window: list[int], epoch: int, items: list[int],
    loaded: tuple[list[LostItem], Any],
) -> MicroBatch:
    lost, data = loaded
    if data is None:
        data = collate([_any_sample(dataset, window, epoch)])
    gone = {bad.item for bad in lost}
    kept = [item for item in items if item not in gone]
    # what another process lost as well is its to tell
    return MicroBatch(kept, len(kept) / len(window), data, tuple(bad for bad in lost if bad.item in items))


def _any_sample(dataset: RequestedItems, window: list[int], epoch: int) -> dict[str, Any]:
    """The first sample that can be loaded, for a forward pass that counts nothing."""
    for item in (*window, *range(len(dataset.dataset))):
        sample = dataset[Request(item, epoch)]
        if not isinstance(sample, LostItem):
            return sample
    raise RunStopped("no item of the data set can be loaded any more; put its files back and resume the run.")


def _leave_signals_to_the_training_process(worker: int) -> None:
    """Ctrl-C and SIGTERM often go to the whole group of processes; the last step before the end still needs its data.

    A second SIGTERM is the loader's own, for a worker that does not end by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_on_the_next)


def _end_on_the_next(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)


def _next(loader: Iterator[Any]) -> Any:
    try:
        return next(loader)
    except UserError as error:
        # a worker process sends its whole traceback as the message; what follows the last error's name is ours
        raise UserError(re.split(r"^[\w.]+Error: ", str(error), flags=re.MULTILINE)[-1].strip()) from None
