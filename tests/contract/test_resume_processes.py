"""A run goes on with another number of processes: no item of the epoch is lost or seen twice. Real processes, gloo."""

from __future__ import annotations

import json
import signal
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsynth.core.data import UnifiedDataset
from diffsynth.diffusion.checkpoint import Progress
from diffsynth.diffusion.step_plan import StepPlan

from .forked import Forked
from .tiny import FamilyAtWork, metrics

OPTIONS: dict[str, Any] = dict(cache="off", num_epochs=3, save_steps=2, lr_scheduler="linear", resume="auto")


class Recorded(UnifiedDataset):
    """Writes down which item of which epoch is asked for."""

    log: Path

    def variant(self, item: int, epoch: int) -> Any:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps([epoch, item]) + "\n")
        return super().variant(item, epoch)


class Recording(FamilyAtWork):
    """The same family with a data set that writes a log beside the output folder."""

    def __init__(self, family: FamilyAtWork) -> None:
        self.__dict__.update(family.__dict__)

    def dataset(self, config: Any) -> UnifiedDataset:
        dataset = super().dataset(config)
        dataset.__class__ = Recorded
        dataset.log = Path(config.output_path).with_name("items.txt")
        return dataset


def start(family: FamilyAtWork, data: Path, output: Path, num_processes: int, **options: Any) -> list[Forked]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launched = {"WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "ACCELERATE_USE_CPU": "true"} if num_processes > 1 else {}
    return [
        Forked(lambda: Recording(family).train(data, output, **{**OPTIONS, **options}),
               **launched, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if launched else {}))
        for rank in range(num_processes)
    ]


def finish(processes: list[Forked], code: int = 0) -> None:
    for process in processes:
        assert process.wait() == code, process.said()


def assert_every_item_was_seen_once_an_epoch(output: Path) -> None:
    lines = output.with_name("items.txt").read_text(encoding="utf-8").splitlines()
    seen = Counter(tuple(json.loads(line)) for line in lines)
    assert seen == {(epoch, item): 1 for epoch in range(3) for item in range(6)}
    assert sum(row["items"] for row in metrics(output)) == 18


def test_from_one_process_to_two(family, pictures, tmp_path):
    output = tmp_path / "run"
    for _ in range(2):
        finish(start(family, pictures, output, 1, max_minutes=1e-6), code=4)
    finish(start(family, pictures, output, 2))
    assert_every_item_was_seen_once_an_epoch(output)
    # two steps of one item, two of two for the rest of the epoch, then three an epoch
    assert [row["items"] for row in metrics(output)] == [1] * 2 + [2] * 8
    # the schedule ends where the run now ends
    assert [round(row["lr"] / 1e-3, 6) for row in metrics(output)] == (
        [round(1 - step / 18, 6) for step in (0, 1)] + [round(1 - step / 10, 6) for step in range(2, 10)])


def test_from_two_processes_to_one_after_one_of_the_two_was_asked_to_stop(family, pictures, tmp_path):
    output = tmp_path / "run"
    processes = start(family, pictures, output, 2)
    assert processes[1].send_when(signal.SIGTERM, lambda: list((output / "state").glob("step-*")))
    finish(processes, code=4)
    done = len(metrics(output))
    assert done < 9
    finish(start(family, pictures, output, 1))
    assert_every_item_was_seen_once_an_epoch(output)
    assert [row["items"] for row in metrics(output)] == [2] * done + [1] * (18 - 2 * done)


@settings(max_examples=300, deadline=None)
@given(
    num_buckets=st.integers(1, 3), num_items=st.integers(1, 40), seed=st.integers(0, 3),
    steps_asked_for=st.none() | st.integers(1, 60), data=st.data())
def test_no_change_of_the_number_of_processes_loses_or_repeats_an_item(
    num_buckets, num_items, seed, steps_asked_for, data
):
    buckets = data.draw(st.lists(st.integers(1, num_buckets), min_size=num_items, max_size=num_items))

    def plan_for(num_processes: int, rank: int = 0) -> StepPlan:
        return StepPlan(buckets, batch_size=1, accumulation_steps=2, num_processes=num_processes, rank=rank, seed=seed,
                        steps_per_epoch=steps_asked_for)

    progress, done = Progress(epoch=1), []
    for num_processes in data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)):
        plan = plan_for(num_processes)
        if progress.step_size not in (0, plan.step_size) and len(done) > sum(steps for _, steps in progress.parts):
            progress.parts.append((progress.step_size, len(done) - sum(steps for _, steps in progress.parts)))
        progress.step_size = plan.step_size
        plan.continue_epoch(1, progress.parts)
        windows = plan.windows(1)
        assert windows[: len(done)] == done
        assert plan.steps_in(1) == len(windows)
        progress.step_in_epoch = len(done)
        assert plan.total_steps(progress, num_epochs=2) == progress.step + len(windows) - len(done)
        done = windows[: data.draw(st.integers(len(done), len(windows)))]
    items = [item for window in windows for item in window]
    assert len(items) == len(set(items))
    if steps_asked_for is None:
        assert sorted(items) == list(range(num_items))
    else:
        # whole rounds through the data, then a part of one
        assert len(windows) == steps_asked_for
        whole = len(items) // num_items * num_items
        assert sorted(items)[:whole] == list(range(whole))
    ranks = [plan_for(num_processes, rank) for rank in range(num_processes)]
    for window in windows[len(done):]:
        shares = [item for rank in ranks for batch in rank.micro_batches(window) for item in batch]
        assert sorted(shares) == sorted(window)


@pytest.mark.parametrize("steps_asked_for", [None, 7])
def test_an_epoch_without_a_change_is_as_it_always_was(steps_asked_for):
    plan = StepPlan([1, 2] * 5, batch_size=1, accumulation_steps=1, num_processes=2, rank=0, seed=3,
                    steps_per_epoch=steps_asked_for)
    before = plan.windows(2)
    plan.continue_epoch(2, [])
    assert plan.windows(2) == before
    plan.continue_epoch(2, [(2, 3)])
    assert plan.windows(2)[:3] == before[:3]
