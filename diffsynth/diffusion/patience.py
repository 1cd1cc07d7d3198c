"""Waiting for the main process, however long it draws or writes."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator


class PatientBarrier:
    """A meeting point of all processes without a timeout; the launcher's own gives up after minutes.

    Making one and calling it are things that all processes have to do. A process that dies ends the waiting of the
    others, because its connection closes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._group: Any = None
        if accelerator.num_processes > 1:
            import torch.distributed

            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=365))

    def __call__(self) -> None:
        """Wait until every process is here."""
        if self._group is not None:
            import torch.distributed

            torch.distributed.barrier(self._group)
