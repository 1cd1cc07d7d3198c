"""Ending a run before its end: on SIGTERM, on Ctrl-C, or when its time is up.

A request only sets a flag. The loop looks at it once per step, saves, and raises ``StoppedEarly``; the filling of the
cache looks at it between two items. A second Ctrl-C leaves at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from ..core.errors import StoppedEarly


class StopRequest:
    """Whether, and why, this process was asked to end the run.

    Args:
        max_minutes: Time from now after which the run is to end; None is never.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.max_minutes = max_minutes
        self.started_at = time.monotonic()
        self._signal: str | None = None

    def reason(self) -> str | None:
        """``SIGTERM``, ``Ctrl-C`` or ``max_minutes 30``; None while nothing has asked."""
        if self._signal is not None:
            return self._signal
        if self.max_minutes is not None and time.monotonic() - self.started_at >= 60 * self.max_minutes:
            return f"max_minutes {self.max_minutes:g}"
        return None

    def raise_if_requested(self) -> None:
        """For work that can be done again from where it is, such as filling the cache.

        Raises:
            StoppedEarly: the run was asked to end.
        """
        if reason := self.reason():
            raise StoppedEarly(f"stopped on request ({reason}) while the cache was being filled; what is encoded is "
                               "kept, start the same command again to go on.")

    @contextmanager
    def listening(self, *signals: signal.Signals) -> Iterator[None]:
        """Within this block these signals set the flag; a second SIGINT is a ``KeyboardInterrupt``.

        Python delivers signals to its main thread alone: in any other this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._receive) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                # None: a handler that was not installed from Python, which cannot be put back
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == "Ctrl-C":
            raise KeyboardInterrupt
        self._signal = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        # not through logging or sys.stderr, which this signal may have interrupted in the middle of a line
        more = ", a second Ctrl-C leaves at once" if number == signal.SIGINT else ""
        os.write(2, f"\n{self._signal}: ending at the next step{more}\n".encode())


def run_launcher(command: Sequence[str]) -> int:
    """Run a launcher of training processes and return its exit code; what asks this process to end reaches them.

    SIGTERM is passed on. Ctrl-C is left to the launcher, which gets it from the terminal as this process does.
    """
    with subprocess.Popen(command) as launched:
        if threading.current_thread() is not threading.main_thread():
            return launched.wait()
        previous = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda number, frame: launched.send_signal(number)),
            signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None),
        }
        try:
            return launched.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
