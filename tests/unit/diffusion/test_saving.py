"""The writer: one job at a time, its errors on the training thread, and copies that training no longer changes."""

from __future__ import annotations

import threading

import pytest
import torch

from diffsynth.core.errors import UserError
from diffsynth.diffusion.saving import BackgroundWriter, HostCopies


def fail() -> None:
    raise UserError("the disk is full")


def test_jobs_run_beside_the_caller_one_after_the_other():
    gate, seen = threading.Event(), []
    with BackgroundWriter() as writer:
        writer.submit(lambda: (gate.wait(10), seen.append(threading.current_thread().name)))
        assert seen == []
        writer.check()  # does not wait
        gate.set()
        writer.submit(lambda: seen.append("second"))
    assert seen == ["diffsynth-writer", "second"]


@pytest.mark.parametrize("ask", ["check", "wait", "submit", "leave"])
def test_an_error_of_the_writer_is_raised_once_by_whoever_asks_next(ask):
    with pytest.raises(UserError, match="disk is full"), BackgroundWriter() as writer:
        writer.submit(fail)
        writer._thread.join()
        {"check": writer.check, "wait": writer.wait, "submit": lambda: writer.submit(print), "leave": int}[ask]()
    writer.wait()


def test_without_background_a_job_is_done_when_submit_returns():
    seen = []
    writer = BackgroundWriter(in_background=False)
    writer.submit(lambda: seen.append(threading.current_thread() is threading.main_thread()))
    assert seen == [True]
    with pytest.raises(UserError):
        writer.submit(fail)


def test_the_error_that_ends_a_run_is_not_hidden_by_one_of_the_writer(caplog):
    with pytest.raises(RuntimeError, match="first"), BackgroundWriter() as writer:
        writer.submit(fail)
        raise RuntimeError("first")
    assert "the last save failed as well: the disk is full" in caplog.text


def test_a_second_ctrl_c_does_not_wait_for_the_writer():
    gate = threading.Event()
    with pytest.raises(KeyboardInterrupt), BackgroundWriter() as writer:
        writer.submit(lambda: gate.wait(30))
        raise KeyboardInterrupt
    assert writer._thread.is_alive()
    gate.set()
    writer.wait()


def test_copies_keep_their_values_and_each_tensor_is_copied_once():
    weight = torch.nn.Parameter(torch.ones(4))
    tree = {"state": {0: {"m": weight, "step": 3}}, "groups": [{"lr": 0.5, "betas": (0.1, 0.2)}]}
    copies = HostCopies()
    kept = copies.of_tree(tree)
    copies.arrive()
    with torch.no_grad():
        weight.zero_()
    assert kept["state"][0]["m"].tolist() == [1.0] * 4
    assert kept["groups"] == [{"lr": 0.5, "betas": (0.1, 0.2)}]
    assert copies.of(weight) is kept["state"][0]["m"]
    assert HostCopies(enabled=False).of(weight).data_ptr() == weight.data_ptr()


def test_memory_of_earlier_copies_is_used_again_for_the_same_tensors_alone():
    kept, changed, new = (torch.nn.Parameter(torch.full((size,), 1.0)) for size in (4, 5, 6))
    first = HostCopies()
    places = [first.of(tensor).data_ptr() for tensor in (kept, changed)]
    first.arrive()
    with torch.no_grad():
        kept += 1
        changed.data = torch.full((7,), 3.0)
    second = HostCopies(earlier=first)
    copies = [second.of(tensor) for tensor in (kept, changed, new)]
    assert [copy.tolist() for copy in copies] == [[2.0] * 4, [3.0] * 7, [1.0] * 6]
    assert copies[0].data_ptr() == places[0]
    assert not any(isinstance(copy, torch.nn.Parameter) or copy.requires_grad for copy in copies)
