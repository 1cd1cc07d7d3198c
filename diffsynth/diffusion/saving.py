"""Saving off the training thread: host copies are taken between two steps, a thread of its own writes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import Thread
from types import TracebackType
from typing import Any

import torch

from ..core.device import pins_memory, wait_for

logger = logging.getLogger(__name__)


class BackgroundWriter:
    """Runs one job at a time in a thread.

    An error in a job is raised on the training thread, by the next ``check``, ``submit`` or ``wait``. Leaving the
    ``with`` block waits for the job that is running, except after a Ctrl-C that is to end the process at once.

    Args:
        in_background: False runs every job at once, on the calling thread.
    """

    def __init__(self, in_background: bool = True) -> None:
        self.in_background = in_background
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Start a job, after the one before it."""
        self.wait()
        if not self.in_background:
            job()
            return
        # a daemon: a second Ctrl-C does not wait for it; what it leaves then is a partial file, never a damaged one
        self._thread = Thread(target=self._run, args=(job,), name="diffsynth-writer", daemon=True)
        self._thread.start()

    def _run(self, job: Callable[[], object]) -> None:
        with ExitStack() as stack:
            stack.push(self._keep)
            job()

    def _keep(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Hold on to what ended a job, for the training thread to raise."""
        self._error = error
        return True

    def check(self) -> None:
        """Raise the error of a job that has ended; never waits."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the running job, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            return
        if error is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()
            if self._error is not None and self._error is not error:
                # the error that ends the run is the one to be seen; this one is told beside it
                logger.error("the last save failed as well: %s", self._error)


class HostCopies:
    """Copies of tensors in host memory, each tensor once; from a GPU all of them on their way at the same time.

    Args:
        enabled: False hands out the tensors themselves, for a writer that is done before they change.
        earlier: Copies that nobody needs any more; their memory is used again. Fresh memory costs the loop more time
            than the copying does.
    """

    def __init__(self, enabled: bool = True, earlier: HostCopies | None = None) -> None:
        self.enabled = enabled
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._free = earlier._copies if earlier is not None else {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The copy of a tensor; complete after ``arrive``."""
        if not self.enabled:
            return tensor.detach()
        if id(tensor) not in self._copies:
            owner, copy = self._free.pop(id(tensor), (None, None))
            if copy is None or owner is not tensor or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty_like(tensor, device="cpu", pin_memory=pins_memory(tensor.device))
            copy.copy_(tensor.detach(), non_blocking=True)
            self._copies[id(tensor)] = (tensor, copy)  # the tensor too: its id must stay its own
        return self._copies[id(tensor)][1]

    def of_tree(self, value: Any) -> Any:
        """The same nest of dictionaries, lists and tuples, with its tensors copied."""
        if isinstance(value, torch.Tensor):
            return self.of(value)
        if isinstance(value, dict):
            return {key: self.of_tree(entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.of_tree(entry) for entry in value)
        return value

    def arrive(self) -> None:
        """Wait until every copy is complete."""
        self._free = {}
        for device in {tensor.device for tensor, _ in self._copies.values()}:
            wait_for(device)


@contextmanager
def values_replaced(
    parameters: Mapping[str, torch.nn.Parameter], values: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Within this block the parameters hold other values, of any device and dtype; afterwards their own, untouched."""
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]
