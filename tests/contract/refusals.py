"""Refusals: one error that says what is wrong, soon, with little memory, and nothing written."""

from __future__ import annotations

import ctypes
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diffsynth.cli import main
from diffsynth.core.errors import UserError, one_line

SECONDS, MIB = 5, 200


@contextmanager
def cheap(seconds: float = SECONDS) -> Iterator[None]:
    """The block takes little time of the processor and little memory."""
    start, peak = time.process_time(), _peak_mib(reset=True)
    yield
    assert time.process_time() - start < seconds
    assert _peak_mib(reset=False) - peak < MIB


def _peak_mib(reset: bool) -> float:
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if reset:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


@contextmanager
def refused(*words: str, folder: Path | None = None, seconds: float = SECONDS) -> Iterator[None]:
    """The block ends in a ``UserError`` that says ``words``, soon, with little memory, and writes nothing."""
    before = sorted(folder.rglob("*")) if folder else []
    with cheap(seconds), pytest.raises(UserError) as caught:
        yield
    message = one_line(caught.value)
    assert message.isprintable()
    assert all(word in message for word in words), message
    assert not folder or sorted(folder.rglob("*")) == before


def ends_with_2(words: list[str], capsys: pytest.CaptureFixture[str], *said: str) -> None:
    """The command line ends with code 2 and one line of error, without a traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(words)
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert left.value.code == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert all(word in lines[0] for word in said), lines[0]
