"""Numbers that are not finite, and losses that jump: found before the optimizer step, on all processes at once.

A bad step is left out: weights, optimizer and average stay as they were, its items and its place in the learning-rate
schedule are used up. It is told with everything known of it, and a replay file lets ``diffsynth replay`` repeat it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import RunStopped
from .item_names import item_name
from .loss_report import BatchReport, StepReport
from .replay import write_replay
from .spikes import SpikeDetector
from .step_plan import MicroBatch

if TYPE_CHECKING:
    from .task import TrainingTask

logger = logging.getLogger(__name__)

NAMED_ITEMS = 8
"""Items that one message names."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What all processes agree on between the gradients and the optimizer step."""

    loss: float
    """Mean over the items of the step."""
    grad_norm: float
    """Before clipping."""
    finite: bool
    """Neither of them is NaN or infinite. An overflow that the scaler of fp16 deals with counts as finite."""
    stop: bool
    """A process was asked to end the run."""
    spike: bool = False
    rolled_back_to: int | None = None
    """Step of the state whose weights are in place again; None where nothing was undone."""
    left_out: bool = False
    """The optimizer does not take this step."""
    hopeless: str | None = None
    """Why the run ends here."""

    def row(self) -> dict[str, Any]:
        """Its part of the step's row in ``metrics.jsonl``; NaN is no JSON."""
        row: dict[str, Any] = {
            "loss": self.loss if self.finite else None,
            "grad_norm": self.grad_norm if math.isfinite(self.grad_norm) else None,
        }
        if self.left_out:
            row["skipped"] = True
        if self.spike:
            row["spike"] = True
        if self.rolled_back_to is not None:
            row["rolled_back_to"] = self.rolled_back_to
        return row


class FiniteGuard:
    """Judges every step, and counts the bad ones.

    Args:
        max_bad_steps: The run ends when this many in a row are bad.
        spikes: Detector of loss spikes.
        roll_back: Go back to the last saved state on a spike, instead of only telling.
    """

    def __init__(self, max_bad_steps: int, spikes: SpikeDetector, roll_back: bool) -> None:
        self.max_bad_steps, self.spikes, self.roll_back = max_bad_steps, spikes, roll_back
        self.bad_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        return {"bad_in_a_row": self.bad_in_a_row, "spikes": self.spikes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bad_in_a_row = state["bad_in_a_row"]
        self.spikes.load_state_dict(state["spikes"])

    def judge(
        self, task: TrainingTask, window: list[int], micro_batches: Sequence[MicroBatch], loss: torch.Tensor,
        grad_norm: torch.Tensor, report: StepReport, stop: bool,
    ) -> Verdict:
        """Decide on a step; the same on every process.

        Args:
            task: The run.
            window: Items of the step, of all processes.
            micro_batches: This process's share.
            loss: This process's part of the mean loss.
            grad_norm: Norm of the whole gradient, equal on all processes.
            report: What the loss function reported on this process.
            stop: This process was asked to end the run.
        """
        total, norm, bad, stopped = _agree(task, loss, grad_norm, stop)
        if bad:
            return self._bad_step(task, window, micro_batches, report, total, norm, stopped)
        self.bad_in_a_row = 0
        limit = self.spikes.limit()
        if not self.spikes.is_spike(total):
            return Verdict(loss=total, grad_norm=norm, finite=True, stop=stopped)
        assert limit is not None
        step = task.progress.step + 1
        told = f"step {step}: the loss {total:.4g} is far above the last {len(self.spikes.losses) - 1} (limit " \
               f"{limit:.4g}, --loss_spike_factor {self.spikes.factor:g}); items {_shortened(window)}"
        back_to = task.roll_back() if self.roll_back else None
        if not self.roll_back:
            _warn(task, f"{told}.")
        elif back_to is None:
            _warn(task, f"{told}. The step was left out; there is no saved state yet to go back to.")
        else:
            _warn(task, f"{told}. The weights are those of step {back_to} again; training goes on with the next items.")
        return Verdict(loss=total, grad_norm=norm, finite=True, stop=stopped, spike=True, rolled_back_to=back_to,
                       left_out=self.roll_back)

    def _bad_step(
        self, task: TrainingTask, window: list[int], micro_batches: Sequence[MicroBatch], report: StepReport,
        loss: float, norm: float, stop: bool,
    ) -> Verdict:
        self.bad_in_a_row += 1
        everywhere = _gather(task, find_suspects(task, window, micro_batches, report))
        by_loss = any(suspect.loss_is_bad for suspect in everywhere)
        suspects = [suspect for suspect in everywhere if suspect.loss_is_bad] if by_loss else everywhere
        chosen = [index for index, batch in enumerate(report.batches) if not by_loss or not _is_finite(batch.loss)]
        path = write_replay(task, window, micro_batches, report, chosen, loss, norm) if chosen else None
        paths = _gather(task, [path] if path is not None else [])
        step = task.progress.step + 1
        what = f"loss {loss:g}, gradient norm {norm:g}"
        told = "; ".join(suspect.text for suspect in suspects[:NAMED_ITEMS])
        more = f" and {len(suspects) - NAMED_ITEMS} more" if len(suspects) > NAMED_ITEMS else ""
        where = f" diffsynth replay {paths[0]} repeats it." if paths else ""
        _warn(task, f"step {step} was left out, its numbers are not finite ({what}): {told}{more}.{where}")
        hopeless = None
        if self.bad_in_a_row >= self.max_bad_steps:
            last_good = step - self.bad_in_a_row
            hopeless = (
                f"step {step}: {self.bad_in_a_row} steps in a row had numbers that are not finite ({what}; items "
                f"{_shortened(window)}), as many as --max_bad_steps allows; the weights are as they were after step "
                f"{last_good}, what was saved before is untouched. Try a lower --learning_rate, or --mixed_precision "
                f"no.{where}")
        return Verdict(loss=loss, grad_norm=norm, finite=False, stop=stop, left_out=True, hopeless=hopeless)


def raise_if_hopeless(verdict: Verdict) -> None:
    """End the run after too many bad steps.

    Raises:
        RunStopped: says which step, which items, and what to try.
    """
    if verdict.hopeless is not None:
        raise RunStopped(verdict.hopeless)


def _agree(
    task: TrainingTask, loss: torch.Tensor, grad_norm: torch.Tensor, stop: bool
) -> tuple[float, float, bool, bool]:
    """Mean loss, gradient norm, whether anything is bad, whether to stop: one reduction, one visit to the host."""
    accelerator = task.accelerator
    scaler = accelerator.scaler
    # the scaler of fp16 answers an overflow with a smaller scale and skips the step, until there is none smaller
    may_overflow = scaler is not None and scaler.get_scale() > 1
    good = torch.isfinite(loss) & (torch.isfinite(grad_norm) | may_overflow)
    norm = grad_norm.detach().float().to(loss.device)
    mine = torch.stack([
        loss, norm if task.is_main else torch.zeros_like(norm), (~good).float(), torch.full_like(loss, float(stop))])
    total, norm_of_all, bad, stops = accelerator.reduce(mine, "sum").tolist()
    return total, norm_of_all, bad > 0, stops > 0


@dataclass(frozen=True)
class Suspect:
    """An item of a bad step, as messages tell of it."""

    text: str
    loss_is_bad: bool
    """Its loss is not finite; otherwise only the gradient is known to be bad."""


def find_suspects(
    task: TrainingTask, window: list[int], micro_batches: Sequence[MicroBatch], report: StepReport
) -> list[Suspect]:
    """The items of this process's forward passes: those with a bad loss where that is known, else all of them."""
    dataset = task.items.dataset
    suspects: list[Suspect] = []
    for batch, forward in zip(micro_batches, report.batches, strict=True):
        loss_is_bad = not _is_finite(forward.loss)
        items = batch.items or window[:1]  # a process with nothing left of the window runs another's item
        told = samples_of(items, forward)
        found = [sample for sample in told if not math.isfinite(sample["loss"])] or told
        for sample in found:
            text = f"{item_name(dataset, sample['item'])} at timestep {sample['timestep']:.1f} with loss " \
                   f"{sample['loss']:g} ({', '.join(f'{name} {dtype}' for name, dtype in sample['dtypes'].items())})"
            suspects.append(Suspect(text, loss_is_bad))
        if not found:
            # a module of one's own that reports nothing
            names = ", ".join(item_name(dataset, item) for item in items)
            suspects.append(Suspect(f"{names} with loss {forward.loss.item():g}", loss_is_bad))
    return suspects


def samples_of(items: Sequence[int], forward: BatchReport) -> list[dict[str, Any]]:
    """Item, timestep, loss and dtypes of each sample that a forward pass over ``items`` reported, as plain numbers."""
    samples = []
    for report in forward.reports:
        dtypes = {name: str(dtype).removeprefix("torch.") for name, dtype in report.dtypes.items()}
        values = zip(items, report.timesteps.tolist(), report.losses.tolist(), strict=False)
        samples += [dict(item=item, timestep=timestep, loss=loss, dtypes=dtypes) for item, timestep, loss in values]
    return samples


def _gather(task: TrainingTask, own: list[Any]) -> list[Any]:
    if task.accelerator.num_processes == 1:
        return own
    from accelerate.utils import gather_object

    return list(gather_object(own))


def _is_finite(loss: torch.Tensor) -> bool:
    return bool(torch.isfinite(loss))


def _shortened(items: list[int]) -> str:
    return f"{items[:NAMED_ITEMS]}{'...' if len(items) > NAMED_ITEMS else ''}"


def _warn(task: TrainingTask, message: str) -> None:
    if task.is_main:
        logger.warning("%s", message)
