"""Items that cannot be used: left out by all processes alike, and listed in ``excluded.jsonl``.

What the data set has is what is trained on and what is listed here, whether an item was bad before the run began or
became so while it went on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from ..config import TrainConfig
from ..core.data.rows import BadRow, BadRowError
from ..core.loader import replace_file
from .step_plan import MicroBatch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..core.data import UnifiedDataset

logger = logging.getLogger(__name__)

FILE_NAME = "excluded.jsonl"
Plan = TypeVar("Plan")
_LOGGED = 20  # of the excluded rows; the file holds all
_IN_OPTIONS = 20  # row numbers that the saved state holds as they are


def agree_on_excluded(accelerator: Accelerator, dataset: Any, config: TrainConfig) -> None:
    """With ``on_bad_item skip``: all processes leave out the rows that the main one finds bad."""
    if config.on_bad_item != "skip" or not hasattr(dataset, "exclude"):
        return
    from accelerate.utils import broadcast_object_list

    if accelerator.is_main_process and dataset.excluded is None:
        dataset.exclude(dataset.bad_rows("pixels"))
    agreed = [dataset.excluded]
    broadcast_object_list(agreed)
    dataset.exclude(agreed[0] or ())
    for bad in dataset.excluded[:_LOGGED] if accelerator.is_main_process else ():
        logger.warning("left out: %s, %s", dataset.metadata_path, bad)


def exclude_together(accelerator: Accelerator, dataset: UnifiedDataset, found: Sequence[BadRow]) -> bool:
    """Leave out, in all processes, what any of them found bad since; whether there was anything."""
    from accelerate.utils import gather_object

    known = {bad.row for bad in dataset.excluded or ()}
    everywhere = {bad.row: bad for bad in gather_object(list(found))}
    new = [bad for row, bad in sorted(everywhere.items()) if row not in known]
    for bad in new if accelerator.is_main_process else ():
        logger.warning("left out: %s, %s", dataset.metadata_path, bad)
    dataset.exclude(new)
    return bool(new)


def excluded_in_options(dataset: Any) -> dict[str, Any]:
    """The rows that are left out, as a resumed run compares them; nothing where there are none."""
    rows = [bad.row for bad in getattr(dataset, "excluded", None) or ()]
    if not rows:
        return {}
    digest = hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()
    return {"rows left out": rows if len(rows) <= _IN_OPTIONS else f"{len(rows)} rows, {digest}"}


class ExcludedList:
    """The file that lists, one JSON object a line, what is not trained on and why.

    Args:
        folder: Output folder of the run.
        dataset: The data set, its rows settled.
    """

    def __init__(self, folder: Path, dataset: Any) -> None:
        self.path = folder / FILE_NAME
        self.dataset = dataset
        self._lost: set[int] = set()

    def start(self, resumed: bool) -> None:
        """Write the rows left out before training; a resumed run keeps what was lost while it trained."""
        excluded = getattr(self.dataset, "excluded", None) or ()
        lines = [json.dumps({**asdict(bad), "found": "before training"}, ensure_ascii=False) for bad in excluded]
        if resumed and self.path.exists():
            lines += [line for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines()
                      if _was_lost_in_training(line)]
        if lines:
            with replace_file(self.path) as file:
                file.write("".join(line + "\n" for line in lines).encode("utf-8"))
        else:
            self.path.unlink(missing_ok=True)

    def add_lost(self, micro_batches: Sequence[MicroBatch], step: int) -> None:
        """Append what became bad during training, each row once; every process writes its own items.

        Args:
            micro_batches: What was loaded of a step.
            step: Its number, from 1.
        """
        for lost in (lost for batch in micro_batches for lost in batch.lost):
            bad = lost.bad_row
            if bad.row in self._lost:
                continue
            self._lost.add(bad.row)
            logger.warning("item %d cannot be loaded any more and is left out: %s", lost.item, bad)
            line = json.dumps({**asdict(bad), "found": f"step {step}"}, ensure_ascii=False)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def share_left(accelerator: Accelerator, micro_batches: Sequence[MicroBatch]) -> float:
    """Share of a step's items, over all processes, that could be loaded; exactly 1 where none was lost."""
    lost = sum(len(batch.lost) for batch in micro_batches)
    kept = sum(len(batch.items) for batch in micro_batches)
    lost, kept = accelerator.reduce(torch.tensor([lost, kept], device=accelerator.device), "sum").tolist()
    return kept / (kept + lost)


def plan_without_bad(accelerator: Accelerator, dataset: Any, config: TrainConfig, plan: Callable[[], Plan]) -> Plan:
    """What ``plan`` makes of the data set, once the files that have become bad since are left out of it.

    All processes call it together. Without ``on_bad_item skip`` the first such file ends the run.
    """
    if config.on_bad_item != "skip":
        return plan()
    while True:
        result, error = None, None
        try:
            result = plan()
        except BadRowError as caught:
            error = caught
        found: list[BadRow] = []
        if error is not None:
            found = dataset.bad_rows("files") or ([error.bad_row] if error.bad_row is not None else [])
        if not exclude_together(accelerator, dataset, found):
            if error is not None:
                raise error
            return cast(Plan, result)


def _was_lost_in_training(line: str) -> bool:
    """Whether a line of an earlier list is to be kept; a last one that a kill cut short is found and written again."""
    try:
        return json.loads(line)["found"] != "before training"
    except json.JSONDecodeError:
        logger.warning("excluded.jsonl: left out an incomplete line")
        return False
