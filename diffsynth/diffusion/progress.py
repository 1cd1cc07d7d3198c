"""What a person sees of long work: how far it is, how fast, how long it will still take."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as ProgressBar
from rich.progress import Task as BarTask
from rich.text import Text


class _SpeedColumn(ProgressColumn):
    """Steps per second, or seconds per step when they are slow."""

    def render(self, task: BarTask) -> Text:
        if not task.speed:
            return Text("")
        return Text(f"{task.speed:.1f}/s" if task.speed >= 1 else f"{1 / task.speed:.1f} s each")


def progress_bar(enabled: bool, to_stderr: bool = False) -> ProgressBar:
    """A bar with count, speed, time gone and time left; disabled, it shows nothing."""
    return ProgressBar(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _SpeedColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"), disable=not enabled,
        console=Console(stderr=True) if to_stderr else None,
        refresh_per_second=2,  # at rich's own 10 the bar takes 1 % of a core
    )
