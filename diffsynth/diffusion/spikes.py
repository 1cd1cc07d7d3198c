"""Telling a loss that jumps from one that merely varies."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any

WINDOW = 64
"""Losses that are looked back on."""
ENOUGH = 16
"""Losses that have to be there before anything is called a spike."""


class SpikeDetector:
    """Compares each loss with the last ones; the same losses give the same answers, resumed or not.

    A loss is a spike when it is above ``median + factor * spread`` of the last 64 finite losses, where ``spread`` is
    the larger of ``1.4826 * median(abs(loss - median))``, the standard deviation of normal numbers as outliers do not
    move it, and 5 % of the median. Spikes enter the window as any other loss: a median does not notice a few of them,
    and a loss that stays high is the new level after 32 steps.

    Args:
        factor: How many spreads above the median; 0 calls nothing a spike.

    Source: Rousseeuw and Croux 1993, J. Am. Stat. Assoc. 88(424), for the spread.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def limit(self) -> float | None:
        """The loss above which the next one is a spike; None while there are too few to say."""
        if self.factor == 0 or len(self.losses) < ENOUGH:
            return None
        median = statistics.median(self.losses)
        spread = 1.4826 * statistics.median(abs(loss - median) for loss in self.losses)
        return median + self.factor * max(spread, 0.05 * abs(median))

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss is a spike; it is remembered then."""
        limit = self.limit()
        self.losses.append(loss)
        return limit is not None and loss > limit

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = deque(state["losses"], maxlen=WINDOW)
