"""Real processes that cost no start: forks of this one, which has imported everything, with a command's exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from diffsynth.core.command_line import run_front_door


class Forked:
    """A function that runs in a process of its own, as a front door would run it.

    Args:
        function: Its errors become exit codes as on the command line.
        **environment: For the new process only.
    """

    def __init__(self, function: Callable[[], object], **environment: str) -> None:
        sys.stdout.flush()
        self.exit_code: int | None = None
        self._said = b""
        # a pipe, so that a limit on the size of files does not hit what the process says
        self._pipe, writable = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                code = _run(function, writable, environment)
            finally:
                os._exit(code)
        os.close(writable)
        os.set_blocking(self._pipe, False)

    def poll(self) -> int | None:
        """Exit code, or minus the signal that ended it; None while it runs."""
        self._read()
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._read()
                os.close(self._pipe)
                self.exit_code = os.waitstatus_to_exitcode(status)
        return self.exit_code

    def wait(self, timeout_s: float = 300) -> int:
        end = time.monotonic() + timeout_s
        while (code := self.poll()) is None:
            assert time.monotonic() < end, f"still running after {timeout_s} s: {self.said()}"
            time.sleep(0.002)
        return code

    def send(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def send_when(self, number: signal.Signals, happened: Callable[[], object], timeout_s: float = 120) -> bool:
        """Send a signal as soon as something has happened; whether the process was still running then."""
        end = time.monotonic() + timeout_s
        while self.poll() is None:
            if happened():
                os.kill(self.pid, number)
                return True
            assert time.monotonic() < end, f"nothing happened in {timeout_s} s: {self.said()}"
            time.sleep(0.0005)
        return False

    def said(self) -> str:
        """Everything that it has written to stdout and stderr."""
        if self.exit_code is None:
            self._read()
        return self._said.decode("utf-8", "replace")

    def _read(self) -> None:
        if self.exit_code is not None:
            return
        try:
            while part := os.read(self._pipe, 65536):
                self._said += part
        except BlockingIOError:
            return  # nothing more for now


def _run(function: Callable[[], object], output: int, environment: dict[str, str]) -> int:
    for standard in (1, 2):
        os.dup2(output, standard)
    sys.stdout = sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1, closefd=False)
    # a process that was started normally has these; pytest and its plugins may have changed them
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(environment)
    try:
        run_front_door(function)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        return 1
