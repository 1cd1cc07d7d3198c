"""Which items form an optimizer step, and which of them a process computes together.

An epoch is cut into windows, one for each optimizer step. Windows depend on the number of items of a step, never on
how that number is split into batch size, accumulation and processes; each process then takes its share of a window.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from ..random import keyed_seed


def plan_epoch(
    buckets: Sequence[Hashable], step_size: int, seed: int, epoch: int, shuffle: bool = True
) -> list[list[int]]:
    """Cut one epoch into windows, each holding the items of one optimizer step.

    Every item is in exactly one window. A window holds items of one bucket, except the windows made of what is left
    over in each bucket. All windows are full but the last.

    Args:
        buckets: Bucket of every item; items of one bucket can be stacked into a batch.
        step_size: Items of an optimizer step: batch size * accumulation steps * processes.
        seed: Of the shuffle, together with ``epoch``.
        shuffle: Otherwise items stay in order as far as buckets allow.
    """
    if step_size < 1:
        raise ValueError(f"step_size must be at least 1, got {step_size}.")
    if not len(buckets):
        return []
    random = _KeyedSorter(keyed_seed(seed, epoch, "shuffle"))
    codes: dict[Hashable, int] = {}
    bucket_of_item = np.fromiter((codes.setdefault(b, len(codes)) for b in buckets), np.int64, len(buckets))
    order = random.permutation(len(buckets)) if shuffle else np.arange(len(buckets))
    windows: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    if len(codes) == 1:
        members = [order]
    else:
        by_bucket = order[np.argsort(bucket_of_item[order], kind="stable")]
        members = np.split(by_bucket, np.cumsum(np.bincount(bucket_of_item))[:-1])
    for items in members:
        num_full = len(items) // step_size * step_size
        windows.extend(items[:num_full].reshape(-1, step_size))
        rest.append(items[num_full:])
    if shuffle:
        rest = [rest[i] for i in random.permutation(len(rest))]
    pooled = np.concatenate(rest)
    num_full = len(pooled) // step_size * step_size
    windows.extend(pooled[:num_full].reshape(-1, step_size))
    if shuffle:
        windows = [windows[i] for i in random.permutation(len(windows))]
    else:
        windows.sort(key=lambda window: int(window.min()))
    if num_full < len(pooled):
        windows.append(pooled[num_full:])
    return [window.tolist() for window in windows]


def split_window(
    window: Sequence[int], buckets: Sequence[Hashable], batch_size: int, num_processes: int, rank: int
) -> list[list[int]]:
    """The micro-batches that one process computes of a window.

    Together the processes compute each item once, in micro-batches of one bucket and at most ``batch_size``. All get
    the same number of them; where there are too few, a process has an empty one.

    Args:
        window: Items of one optimizer step, from ``plan_epoch``.
        buckets: Bucket of every item of the epoch.
    """
    if batch_size < 1 or num_processes < 1:
        raise ValueError(f"batch_size and num_processes must be at least 1, got {batch_size} and {num_processes}.")
    if not 0 <= rank < num_processes:
        raise ValueError(f"rank must be in [0, {num_processes}), got {rank}.")
    groups: dict[Hashable, list[int]] = {}
    for item in window:
        groups.setdefault(buckets[item], []).append(item)
    batches = [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]
    # rather two processes with half a micro-batch each than one that waits for the other
    while len(batches) % num_processes:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]))
        if len(batches[largest]) == 1:
            batches.extend([] for _ in range(-len(batches) % num_processes))
        else:
            batch = batches[largest]
            half = (len(batch) + 1) // 2
            batches[largest : largest + 1] = [batch[:half], batch[half:]]
    return batches[rank::num_processes]


class _KeyedSorter:
    """Permutations from the raw output of a counter-based generator, which no numpy version changes."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.Philox(key=seed)

    def permutation(self, size: int) -> np.ndarray:
        return np.argsort(self._bits.random_raw(size), kind="stable")
