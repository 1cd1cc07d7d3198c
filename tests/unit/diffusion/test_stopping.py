"""Requests to end a run, as real signals to this process."""

from __future__ import annotations

import os
import signal
import sys
import threading

import pytest

from diffsynth.core.command_line import run_front_door
from diffsynth.core.errors import StoppedEarly
from diffsynth.diffusion.stopping import StopRequest, run_launcher
from tests.contract.forked import Forked


def test_first_ctrl_c_asks_and_the_second_leaves():
    stop = StopRequest()
    with stop.listening(signal.SIGINT, signal.SIGTERM):
        assert stop.reason() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason() == "Ctrl-C"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_sigterm_asks_however_often_it_comes_and_ctrl_c_after_it_still_asks_first():
    stop = StopRequest()
    with stop.listening(signal.SIGINT, signal.SIGTERM):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.reason() == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason() == "Ctrl-C"


def test_handlers_are_put_back_also_after_an_error():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError), StopRequest().listening(signal.SIGINT, signal.SIGTERM):
        assert signal.getsignal(signal.SIGTERM) not in before
        raise RuntimeError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_nothing_is_installed():
    found = []

    def listen() -> None:
        with StopRequest().listening(signal.SIGTERM):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_time_is_counted_from_the_start():
    stop = StopRequest(max_minutes=1)
    assert stop.reason() is None
    stop.started_at -= 61
    assert stop.reason() == "max_minutes 1"
    with pytest.raises(StoppedEarly, match="max_minutes 1"):
        stop.raise_if_requested()


def test_a_run_that_was_stopped_ends_with_code_4(capsys):
    def stopped() -> None:
        raise StoppedEarly("stopped on request (SIGTERM) after step 3 of 9")

    with pytest.raises(SystemExit) as left:
        run_front_door(stopped)
    assert left.value.code == 4
    assert capsys.readouterr().err == "stopped on request (SIGTERM) after step 3 of 9\n"


CHILD = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
print("ready", flush=True)
time.sleep(60)
"""


def test_sigterm_is_passed_on_to_the_launcher_and_its_exit_code_comes_back():
    process = Forked(lambda: sys.exit(run_launcher([sys.executable, "-c", CHILD])))
    assert process.send_when(signal.SIGTERM, lambda: "ready" in process.said())
    assert process.wait() == 7, process.said()
