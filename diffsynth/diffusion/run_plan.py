"""What a run will do, told before its first step: items, steps, save points. Also written as ``plan.json``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.loader.writer import replace_file
from .bad_items import FILE_NAME as EXCLUDED_FILE
from .disk_space import Footprint
from .validation import num_rows

if TYPE_CHECKING:
    from rich.table import Table

    from .task import TrainingTask

FILE_NAME = "plan.json"
_SHOWN_BUCKETS = 12


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The numbers of a run, from where it is now to its end."""

    rows_found: int
    """In the metadata."""
    rows_excluded: int
    rows_held_out: int
    """For validation."""
    rows_trained: int
    dataset_repeat: int
    items_per_epoch: int
    """Once through the data: rows trained, times the repeat."""
    buckets: dict[str, int]
    """WIDTHxHEIGHT -> items; empty where a step has one item, which asks for no size."""
    batch_size: int
    gradient_accumulation_steps: int
    num_processes: int
    items_per_step: int
    steps_per_epoch: int
    num_epochs: int
    steps_done: int
    """By the run that is continued."""
    total_steps: int
    cache_entries: int
    """Outputs of the frozen models that are read in training; 0 where every step encodes anew."""
    cache_entries_made: int
    """By this process, just now."""
    save_points: list[int]
    """Steps after which weights and state are saved."""
    files_per_save: int
    bytes_per_save: int
    """Of the weight files, estimated from the parameters."""
    bytes_of_state: int
    """Of the training state, of which at most two lie there at once, estimated likewise."""
    preview_points: list[int]
    """Steps after which sample pictures are drawn; 0 is before the first."""
    validation_points: list[int]


def plan_run(task: TrainingTask) -> RunPlan:
    """The plan of a run that is set up, and resumed where it is to be."""
    config, plan, progress = task.config, task.plan, task.progress
    whole, trained, cached = task.excluded.dataset, task.items.dataset, getattr(task.items.dataset, "units", ())
    excluded = len(getattr(whole, "excluded", None) or ())
    footprint = Footprint.of(task.model, config)
    saves, previews, validations = _points(task)
    models = (bool(task.model.full_models) + bool(task.model.lora_models)) or 1
    return RunPlan(
        rows_found=num_rows(whole) + excluded, rows_excluded=excluded,
        rows_held_out=num_rows(whole) - num_rows(trained), rows_trained=num_rows(trained),
        dataset_repeat=len(trained) // num_rows(trained), items_per_epoch=len(trained),
        buckets=_bucket_counts(plan.buckets) if plan.step_size > 1 else {},
        batch_size=config.batch_size, gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_processes=task.accelerator.num_processes, items_per_step=plan.step_size,
        steps_per_epoch=plan.steps_per_epoch, num_epochs=config.num_epochs,
        steps_done=progress.step, total_steps=task.total_steps,
        cache_entries=len({key for entries in cached for keys in entries.keys for key in keys}),
        cache_entries_made=getattr(trained, "num_made", 0),
        save_points=saves, files_per_save=models * (2 if task.ema else 1),
        bytes_per_save=footprint.weights, bytes_of_state=footprint.state,
        preview_points=previews, validation_points=validations,
    )


def _points(task: TrainingTask) -> tuple[list[int], list[int], list[int]]:
    """Steps after which the loop saves, draws and validates."""
    config, first, last = task.config, task.progress.step, task.total_steps
    ends = set(_ends_of_epochs(task))
    steps = range(first + 1, last + 1)

    def due(every: int | None, otherwise: set[int]) -> set[int]:
        return {step for step in steps if step % every == 0} if every else otherwise

    saves = due(config.save_steps, ends)
    final = {last} if last > first else set()
    draws = config.sample_prompts and hasattr(task.model, "pipe")
    pictures = due(config.sample_every, saves) | final | ({0} if first == 0 else set()) if draws else set()
    validations = due(config.validation_every, saves) | final if task.validation else set()
    return sorted(saves | final), sorted(pictures), sorted(validations)


def _ends_of_epochs(task: TrainingTask) -> Iterator[int]:
    progress, plan = task.progress, task.plan
    step, epoch = progress.step - progress.step_in_epoch, progress.epoch
    while step < task.total_steps:
        step += plan.steps_in(epoch)
        epoch += 1
        if step <= task.total_steps:
            yield step


def _bucket_counts(buckets: Any) -> dict[str, int]:
    counts = Counter(bucket for bucket in buckets if bucket is not None)
    return {f"{width}x{height}": count for (height, width), count in counts.most_common()}


def announce(plan: RunPlan, folder: Path) -> None:
    """Write ``plan.json`` and show the plan."""
    from rich.console import Console

    with replace_file(folder / FILE_NAME) as file:
        file.write((json.dumps(asdict(plan), indent=2) + "\n").encode("utf-8"))
    Console(markup=False).print(plan_table(plan))


def plan_table(plan: RunPlan) -> Table:
    """The plan for people."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Plan", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(plan):
        table.add_row(name, Text(value))
    return table


def _lines(plan: RunPlan) -> Iterator[tuple[str, str]]:
    rows = f"{plan.rows_found} found = {plan.rows_trained} trained"
    if plan.rows_excluded:
        rows += f" + {plan.rows_excluded} left out (listed in {EXCLUDED_FILE})"
    if plan.rows_held_out:
        rows += f" + {plan.rows_held_out} held out for validation"
    yield "rows", rows
    yield "items", f"{plan.rows_trained} rows x {plan.dataset_repeat} = {plan.items_per_epoch} once through the data"
    if plan.buckets:
        shown = [f"{size}: {count}" for size, count in list(plan.buckets.items())[:_SHOWN_BUCKETS]]
        more = [f"and {len(plan.buckets) - _SHOWN_BUCKETS} more"] if len(plan.buckets) > _SHOWN_BUCKETS else []
        yield "buckets", ", ".join(shown + more)
    yield "step", (f"batch {plan.batch_size} x accumulation {plan.gradient_accumulation_steps} x processes "
                   f"{plan.num_processes} = {plan.items_per_step} items")
    done = f", {plan.steps_done} of them done" if plan.steps_done else ""
    yield "steps", f"{plan.steps_per_epoch} an epoch, {plan.num_epochs} epochs, {plan.total_steps} in all{done}"
    if plan.cache_entries:
        yield "encoders", f"{plan.cache_entries} outputs read from the cache, {plan.cache_entries_made} made just now"
    else:
        yield "encoders", "run in every step; nothing is cached"
    yield "saves", _saves(plan)
    if plan.validation_points:
        yield "validation", _at(plan.validation_points)
    if plan.preview_points:
        yield "samples", _at(plan.preview_points)
    yield "time", "known after the first steps, at the right of the bar"


def _saves(plan: RunPlan) -> str:
    files = f"{plan.files_per_save} file{'s' if plan.files_per_save > 1 else ''}"
    return (f"{_at(plan.save_points)}; {files} of about {_size(plan.bytes_per_save)} each time, and a state of about "
            f"{_size(plan.bytes_of_state)}")


def _at(steps: list[int]) -> str:
    listed = ", ".join(map(str, steps if len(steps) <= 6 else [*steps[:3], "...", *steps[-2:]]))
    return f"{len(steps)} time{'' if len(steps) == 1 else 's'}, after step {listed}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
