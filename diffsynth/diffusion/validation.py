"""Loss on held-out items: fixed noise on a fixed grid of noise levels, so that two numbers can be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..core import random
from ..core.errors import UserError
from .item_names import rows_of
from .loss_report import watch_losses
from .schedule import noise_levels_given

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .training_module import DiffusionTrainingModule

KEY = 0
"""Stands where training has its seed: another seed, another order of the rows, another run see the same noise."""


def held_out_rows(dataset: Any, split: float) -> list[int]:
    """The rows that are held out, in the order of their keys.

    Rows are ranked by a hash of their file names, which depends on nothing else: neither on the seed nor on captions,
    sizes or the order of the metadata; a row added to the data set moves at most one other.

    Args:
        dataset: A ``UnifiedDataset``, cached or not, or anything with a length.
        split: A share below 1 (rounded, at least one row), or a number of rows; 0 is none.
    Raises:
        UserError: nothing would be left to train on.
    """
    if split == 0:
        return []
    total = num_rows(dataset)
    count = int(split) if split >= 1 else max(1, round(split * total))
    if count >= total:
        raise UserError(f"validation_split {split:g} holds out {count} of the {total} rows of the data set, which "
                        "leaves nothing to train on; use a smaller one.")
    return sorted(range(total), key=lambda row: (row_key(dataset, row), row))[:count]


def num_rows(dataset: Any) -> int:
    """Rows of a data set, its repeats left aside."""
    return getattr(dataset, "num_rows", len(dataset))


def row_key(dataset: Any, row: int) -> int:
    """What tells a row from others in every run: a hash of its file names, else of its metadata, else its number."""
    source = rows_of(dataset)
    if source is None:
        return random.keyed_seed(KEY, "held out", row)
    columns = source.row(row)
    names = {key: columns[key] for key in getattr(source, "data_file_keys", ()) if key in columns}
    text = json.dumps(names or columns, sort_keys=True, ensure_ascii=False, default=str)
    return random.keyed_seed(KEY, "held out", text)


class SomeRows:
    """Some rows of a data set as a data set of their own, which has whatever that one has.

    Args:
        dataset: A data set whose items go round its rows: item ``i`` shows row ``i % num_rows``.
        rows: The rows that it keeps, in its own order.
    """

    by_item = frozenset((
        "bucket", "fingerprint", "load", "num_captions", "row", "row_number", "variant", "variants"))
    """Methods whose first argument is an item."""

    def __init__(self, dataset: Any, rows: Sequence[int]) -> None:
        self.dataset, self.rows = dataset, tuple(rows)
        self.num_rows = len(self.rows)

    def __len__(self) -> int:
        return len(self.dataset) // num_rows(self.dataset) * self.num_rows

    def __getitem__(self, item: int) -> Any:
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of a data set of {len(self)}")
        return self.dataset[self.original(item)]

    def original(self, item: int) -> int:
        """The item of the whole data set; beyond its length too, for epochs that go round again."""
        repeat, row = divmod(item, self.num_rows)
        return repeat * num_rows(self.dataset) + self.rows[row]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("dataset", "rows"):
            raise AttributeError(name)  # a copy that is being unpickled
        found = getattr(self.dataset, name)
        return partial(self._by_item, found) if name in self.by_item else found

    def _by_item(self, method: Any, item: int, *arguments: Any, **named: Any) -> Any:
        return method(self.original(item), *arguments, **named)


def split_off(dataset: Any, split: float) -> tuple[Any, list[int]]:
    """The data set that is left to train on, and the rows that are held out of it.

    Raises:
        UserError: nothing would be left to train on.
    """
    held_out = held_out_rows(dataset, split)
    if not held_out:
        return dataset, []
    return SomeRows(dataset, sorted(set(range(num_rows(dataset))) - set(held_out))), held_out


class Validation:
    """Computes the held-out loss, and remembers the lowest.

    Args:
        accelerator: Processes that share the items.
        model: The module that is trained.
        dataset: The data set that the rows belong to.
        rows: The held-out rows.
        num_timesteps: Points of the grid ``sigma = (k + 0.5) / num_timesteps``.
        batch_size: Points in one forward pass.
    """

    def __init__(
        self, accelerator: Accelerator, model: DiffusionTrainingModule, dataset: Any, rows: Sequence[int],
        num_timesteps: int, batch_size: int,
    ) -> None:
        self.accelerator, self.model, self.dataset, self.rows = accelerator, model, dataset, list(rows)
        self.keys = [row_key(dataset, row) for row in self.rows]
        self.sigmas = (torch.arange(num_timesteps, dtype=torch.float32) + 0.5) / num_timesteps
        self.batch_size = batch_size
        self.best_loss, self.best_step = math.inf, 0
        self.is_due = False
        """The run was asked to end where it should have been validated; a resumed run begins with that."""

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss if self.best_step else None, "best_step": self.best_step,
                "is_due": self.is_due}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_step, self.is_due = state["best_step"], state["is_due"]
        self.best_loss = state["best_loss"] if self.best_step else math.inf

    def run(self, step: int) -> dict[str, Any]:
        """The row of ``metrics.jsonl`` for the weights as they are; equal on all processes and for any number of them.

        ``validation_loss_by_band`` gives the mean over the items at each timestep of the grid, ``validation_loss``
        the mean of those; neither is weighted. ``best`` marks the lowest so far.
        """
        losses = self.losses().cpu().double()
        bands = {f"{1000 * sigma:g}": _number(loss.item())
                 for sigma, loss in zip(self.sigmas.tolist(), losses.mean(0), strict=True)}
        loss = losses.mean().item()
        row = dict(step=step, validation_loss=_number(loss), validation_loss_by_band=bands)
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, step
            row["best"] = True
        return row

    @torch.no_grad()
    def losses(self) -> torch.Tensor:
        """Loss of every item at every point of the grid, (items, points), float32, on the CPU."""
        accelerator = self.accelerator
        table = torch.zeros(len(self.rows), len(self.sigmas), device=accelerator.device)
        for index in range(accelerator.process_index, len(self.rows), accelerator.num_processes):
            row = self.rows[index]
            # always the first variant, with its caption
            data = self.dataset.load(row, 0) if hasattr(self.dataset, "variant") else self.dataset[row]
            for first in range(0, len(self.sigmas), self.batch_size):
                points = slice(first, first + self.batch_size)
                table[index, points] = self._forward(data, self.keys[index], self.sigmas[points])
        # each entry is one process's number and the others' zeros: the sum is exact
        return accelerator.reduce(table, "sum").cpu()

    def _forward(self, data: Any, key: int, sigmas: torch.Tensor) -> torch.Tensor:
        count = len(sigmas)
        with random.keyed_items(KEY, 0, [key] * count), noise_levels_given(sigmas), watch_losses() as seen:
            loss = self.model(self.model.collate([data] * count))
        if not seen.pending:
            return loss.detach().float().expand(count)  # a module of one's own that reports nothing
        return torch.cat([report.losses for report in seen.pending]).float()


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
