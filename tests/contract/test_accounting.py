"""Promise 6: found = trained + left out. Every row is seen as often as it should be, or listed with its reason."""

from __future__ import annotations

import json
import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsynth.config import CheckConfig
from diffsynth.core import random
from diffsynth.core.data import UnifiedDataset
from diffsynth.core.errors import RunStopped, UserError
from diffsynth.diffusion import step_plan
from diffsynth.diffusion.step_plan import StepPlan
from diffsynth.trainers.check import check
from diffsynth.trainers.run import check_dataset
from tests.pictures import make_dataset

from .forked import Forked
from .random_datasets import run_case
from .tiny import FamilyAtWork, metrics

OPTIONS: dict[str, Any] = dict(height=None, width=None, max_pixels=32 * 32, on_bad_item="skip")


@pytest.fixture
def quiet() -> Iterator[None]:
    """Damaged files are warned of, and in random data sets there are many."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


# -- the engine, without a network


@pytest.mark.parametrize("tenth", range(10))
def test_random_data_sets_are_accounted_for(tenth: int, tmp_path: Path, quiet: None) -> None:
    for number in range(10 * tenth, 10 * tenth + 10):
        run_case(number, tmp_path / str(number))


def _without_last_batch(plan_epoch: Callable[..., list[list[int]]]) -> Callable[..., list[list[int]]]:
    def broken(buckets: Any, step_size: int, *rest: Any) -> list[list[int]]:
        windows = plan_epoch(buckets, step_size, *rest)
        return windows[:-1] if len(windows) > 1 and len(windows[-1]) < step_size else windows

    return broken


def test_a_dropped_last_batch_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    monkeypatch.setattr(step_plan, "plan_epoch", _without_last_batch(step_plan.plan_epoch))
    with pytest.raises(AssertionError, match="an item was left out"):
        for number in range(40):
            run_case(number, tmp_path / str(number))


@settings(deadline=None)
@given(buckets=st.lists(st.sampled_from("abc"), min_size=1, max_size=40), batch_size=st.integers(1, 5),
       accumulation=st.integers(1, 4), num_processes=st.integers(1, 4), seed=st.integers(0, 9))
def test_processes_together_compute_each_item_of_an_epoch_once(
    buckets: list[str], batch_size: int, accumulation: int, num_processes: int, seed: int
) -> None:
    plans = [StepPlan(buckets, batch_size=batch_size, accumulation_steps=accumulation, num_processes=num_processes,
                      rank=rank, seed=seed) for rank in range(num_processes)]
    computed: Counter[int] = Counter()
    for window in plans[0].windows(1):
        shares = [plan.micro_batches(window) for plan in plans]
        assert len({len(share) for share in shares}) == 1
        for items in (items for share in shares for items in share):
            assert len(items) <= batch_size
            assert len({buckets[item] for item in items}) <= 1
            computed.update(items)
    assert computed == Counter(range(len(buckets)))


# -- real trainings


class Watched(FamilyAtWork):
    """A family at work whose forward passes write down the items that they compute.

    Args:
        before_forward: Called before each forward pass with the number of those made so far.
        after_check: Called with the data set once it has been checked as ``diffsynth train`` checks it.
    """

    def __init__(self, family: FamilyAtWork, before_forward: Callable[[int], object] = lambda count: None,
                 after_check: Callable[[UnifiedDataset], object] = lambda dataset: None) -> None:
        self.__dict__.update(family.__dict__)
        self.before_forward, self.after_check = before_forward, after_check
        self.seen: list[tuple[int, ...]] = []

    def module(self, config: Any) -> Any:
        module = super().module(config)
        module.register_forward_pre_hook(self._note)
        return module

    def _note(self, module: Any, arguments: Any) -> None:
        self.before_forward(len(self.seen))
        self.seen.append(random.current_items())

    def dataset(self, config: Any) -> UnifiedDataset:
        dataset = super().dataset(config)
        check_dataset(config, dataset)
        self.after_check(dataset)
        return dataset


def spoil(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])


def listed(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "excluded.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def eight(tmp_path: Path) -> Path:
    """Eight pictures of two sizes; the third is damaged, the last is not there."""
    folder = make_dataset(tmp_path / "eight", count=8, sizes=[(64, 48), (48, 64)])
    spoil(folder, "image_2.png")
    (folder / "image_7.png").unlink()
    return folder


def test_every_item_reaches_the_loss_and_the_rest_is_listed(
    family: FamilyAtWork, eight: Path, tmp_path: Path
) -> None:
    watched = Watched(family)
    watched.train(eight, tmp_path / "run", **OPTIONS, num_epochs=2, dataset_repeat=2, batch_size=2,
                  gradient_accumulation_steps=2)
    assert Counter(item for items in watched.seen for item in items) == dict.fromkeys(range(12), 2)
    found = listed(tmp_path / "run")
    assert [(bad["row"], bad["column"], bad["found"]) for bad in found] == [
        (3, "image", "before training"), (8, "image", "before training")]
    assert "is damaged" in found[0]["reason"]
    assert "does not exist" in found[1]["reason"]
    assert [row["items"] for row in metrics(tmp_path / "run")] == [4, 4, 4] * 2


@pytest.mark.parametrize("options", [
    dict(num_epochs=2, batch_size=4, gradient_accumulation_steps=2, dataset_repeat=3),
    dict(num_epochs=3, batch_size=5, save_steps=2, validation_split=2, validation_every=1),
    dict(num_epochs=2, steps_per_epoch=3, max_steps=4, trainable_models="dit", ema_decay=0.9),
], ids=["repeats", "validation", "cut short"])
def test_the_plan_is_what_then_happens(
    family: FamilyAtWork, eight: Path, tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    if "trainable_models" in options:
        options = {**options, "trainable_models": family.tiny.options["lora_base_model"], "lora_base_model": None,
                   "lora_target_modules": ""}
    Watched(family).train(eight, output, **OPTIONS, **options)
    plan = json.loads((output / "plan.json").read_text(encoding="utf-8"))
    rows = [row for row in metrics(output) if "loss" in row]
    assert plan["rows_found"] == 8 == plan["rows_trained"] + plan["rows_excluded"] + plan["rows_held_out"]
    assert plan["rows_excluded"] == len(listed(output)) == 2
    assert plan["rows_held_out"] == options.get("validation_split", 0)
    assert plan["items_per_epoch"] == plan["rows_trained"] * options.get("dataset_repeat", 1)
    assert plan["total_steps"] == len(rows) == rows[-1]["step"]
    assert plan["steps_per_epoch"] == sum(row["epoch"] == 0 for row in rows)
    assert max(row["items"] for row in rows) <= plan["items_per_step"]
    if not options.get("steps_per_epoch"):
        assert sum(row["items"] for row in rows) == plan["items_per_epoch"] * options["num_epochs"]
    if plan["items_per_step"] > 1:
        assert sum(plan["buckets"].values()) == plan["items_per_epoch"]
    files = [path for path in output.glob("*.safetensors") if path.name.startswith(("step-", "epoch-"))]
    assert len(files) == len(plan["save_points"]) * plan["files_per_save"]
    written = sum(path.stat().st_size for path in files)
    assert written == pytest.approx(plan["bytes_per_save"] * len(plan["save_points"]), rel=0.3)
    assert plan["validation_points"] == [row["step"] for row in metrics(output) if "validation_loss" in row]
    shown = capsys.readouterr().out
    assert "8 found = " in shown
    assert f"{plan['total_steps']} in all" in shown


def test_a_resumed_run_plans_the_rest(family: FamilyAtWork, pictures: Path, tmp_path: Path) -> None:
    family.train(pictures, tmp_path / "run", num_epochs=1, save_steps=2)
    family.train(pictures, tmp_path / "run", num_epochs=2, save_steps=5, resume="auto")
    plan = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert (plan["steps_done"], plan["total_steps"], plan["save_points"]) == (6, 12, [10, 12])
    assert plan["cache_entries"] > 0 == plan["cache_entries_made"]


def test_stop_refuses_before_anything_is_written_and_names_the_rows(
    family: FamilyAtWork, eight: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        Watched(family).train(eight, tmp_path / "run", **{**OPTIONS, "on_bad_item": "stop", "cache": "off"})
    for part in ("row 3, column 'image'", "1 more rows have problems: [row 8, column 'image'",
                 f"diffsynth check {eight}", "--on_bad_item skip"):
        assert part in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_rows_without_captions_are_left_out_with_that_reason(family: FamilyAtWork, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data", count=3)
    (folder / "metadata.csv").unlink()
    for index in (0, 2):
        (folder / f"image_{index}.txt").write_text("a picture", encoding="utf-8")
    watched = Watched(family)
    watched.train(folder, tmp_path / "run", **OPTIONS)
    assert sorted(watched.seen) == [(0,), (1,)]
    assert [(bad["row"], bad["column"]) for bad in listed(tmp_path / "run")] == [(2, "prompt")]
    assert "image_1.png has no caption" in listed(tmp_path / "run")[0]["reason"]


def test_a_data_set_of_bad_rows_alone_is_refused(family: FamilyAtWork, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data", count=2)
    for path in folder.glob("*.png"):
        spoil(folder, path.name)
    with pytest.raises(UserError, match="none of the 2 rows can be trained on"):
        Watched(family).train(folder, tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_a_picture_that_goes_bad_before_it_is_encoded_is_left_out(
    family: FamilyAtWork, eight: Path, tmp_path: Path
) -> None:
    """Its caption is that of another row, whose entry is to be made all the same."""
    text = (eight / "metadata.csv").read_text(encoding="utf-8")
    captions = [line.partition(",")[2] for line in text.splitlines()]
    (eight / "metadata.csv").write_text(text.replace(captions[6], captions[5]), encoding="utf-8")
    watched = Watched(family, after_check=lambda dataset: spoil(eight, "image_4.png"))
    watched.train(eight, tmp_path / "run", **OPTIONS)
    assert sorted(watched.seen) == [(item,) for item in range(5)]
    assert [bad["row"] for bad in listed(tmp_path / "run")] == [3, 5, 8]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert (plan["rows_found"], plan["rows_trained"], plan["rows_excluded"]) == (8, 5, 3)
    # a file that is gone is found when the content of the files is asked for
    gone = Watched(family, after_check=lambda dataset: (eight / "image_5.png").unlink())
    gone.train(eight, tmp_path / "second", **OPTIONS)
    assert [bad["row"] for bad in listed(tmp_path / "second")] == [3, 5, 6, 8]


def test_a_file_that_goes_during_training_is_listed(family: FamilyAtWork, eight: Path, tmp_path: Path) -> None:
    def remove(count: int) -> None:
        if count == 2:
            (eight / "image_4.png").unlink()

    watched = Watched(family, before_forward=remove)
    watched.train(eight, tmp_path / "run", **{**OPTIONS, "cache": "off", "height": 32, "width": 32},
                  num_epochs=3, batch_size=2)
    steps = metrics(tmp_path / "run")
    late = [bad for bad in listed(tmp_path / "run") if bad["found"] != "before training"]
    assert [(bad["row"], bad["column"]) for bad in late] == [(5, "image")]
    first_lost = int(late[0]["found"].removeprefix("step "))
    assert next(row["step"] for row in steps if row["items"] == 1) == first_lost
    # row 5 is item 3 of those that are left
    counts = Counter(item for items in watched.seen for item in items)
    assert sum(row["items"] for row in steps) == sum(counts.values())
    assert {item: count for item, count in counts.items() if item != 3} == dict.fromkeys((0, 1, 2, 4, 5), 3)
    assert counts[3] < 3


def test_a_step_that_lost_an_item_is_the_mean_of_the_others(family: FamilyAtWork, tmp_path: Path) -> None:
    """The same as if the item had never been in that step: weights add up to one."""
    folder = make_dataset(tmp_path / "data", count=2)
    options: dict[str, Any] = {**OPTIONS, "cache": "off", "max_grad_norm": 0}
    Watched(family, after_check=lambda dataset: (folder / "image_1.png").unlink()).train(
        folder, tmp_path / "lost", **options, batch_size=2)
    make_dataset(folder, count=1)
    Watched(family).train(folder, tmp_path / "alone", **options)
    (lost,), (alone,) = metrics(tmp_path / "lost"), metrics(tmp_path / "alone")
    assert lost["items"] == 1
    assert lost["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert lost["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)


def test_a_step_that_lost_all_its_items_leaves_the_weights(family: FamilyAtWork, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data", count=2)
    Watched(family, after_check=lambda dataset: (folder / "image_1.png").unlink()).train(
        folder, tmp_path / "run", **{**OPTIONS, "cache": "off"})
    empty, full = sorted(metrics(tmp_path / "run"), key=lambda row: row["items"])
    assert (empty["items"], empty["loss"], empty["skipped"]) == (0, None, True)
    assert full["items"] == 1
    assert full["loss"] > 0


def test_a_run_whose_files_are_all_gone_is_stopped(family: FamilyAtWork, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data", count=2)
    with pytest.raises(RunStopped, match="no item of the data set can be loaded any more"):
        Watched(family, after_check=lambda dataset: [path.unlink() for path in folder.glob("*.png")]).train(
            folder, tmp_path / "run", **{**OPTIONS, "cache": "off"})


def test_a_resumed_run_has_the_same_rows(family: FamilyAtWork, eight: Path, tmp_path: Path) -> None:
    Watched(family).train(eight, tmp_path / "run", **OPTIONS, max_steps=3, save_steps=1, num_epochs=2)
    # another row is bad now, and one of the old ones is not: as many as before
    spoil(eight, "image_0.png")
    make_dataset(tmp_path / "good", count=8)
    (tmp_path / "good" / "image_7.png").rename(eight / "image_7.png")
    with pytest.raises(UserError, match=r"rows left out: \[3, 8\] -> \[1, 3\]"):
        Watched(family).train(eight, tmp_path / "run", **OPTIONS, num_epochs=2, save_steps=1, resume="auto")


def test_processes_leave_out_what_the_main_one_finds(family: FamilyAtWork, eight: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        Forked(lambda: Watched(family).train(eight, tmp_path / "run", **OPTIONS, batch_size=2),
               WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
               ACCELERATE_USE_CPU="true", RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.said() for rank in ranks]
    assert [row["items"] for row in metrics(tmp_path / "run")] == [4, 2]
    assert [bad["row"] for bad in listed(tmp_path / "run")] == [3, 8]
    plan = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert (plan["num_processes"], plan["items_per_step"], plan["total_steps"]) == (2, 4, 2)


# -- captions


def test_each_epoch_shows_one_of_the_captions(family: FamilyAtWork, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data", count=3)
    (folder / "metadata.csv").unlink()
    captions = [["a dog", "a cat", "a red circle"], "two green squares", ["a dog", "a blue star"]]
    (folder / "metadata.json").write_text(json.dumps(
        [{"image": f"image_{index}.png", "prompt": prompt} for index, prompt in enumerate(captions)]), encoding="utf-8")
    shown: dict[str, list[Any]] = {}
    for cache in ("auto", "off"):
        family.train(folder, tmp_path / cache, num_epochs=6, cache=cache)
        shown[cache] = [row["loss"] for row in metrics(tmp_path / cache)]
    assert shown["auto"] == pytest.approx(shown["off"], rel=1e-5)
    plan = json.loads((tmp_path / "auto" / "plan.json").read_text(encoding="utf-8"))
    # three pictures and five different captions; "a dog" is encoded once
    assert plan["cache_entries"] == 3 + 5


# -- the linter


def test_check_measures_captions_with_the_tokenizers_of_the_family(family: FamilyAtWork, tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data", count=2)
    long = "a dog is jumping " * 25 + "at last"
    with (folder / "metadata.csv").open("a", encoding="utf-8") as file:
        file.write(f"image_0.png,{long}\n")
    report = check(CheckConfig(
        dataset_base_path=str(folder), model_paths=tuple(family.model_files), max_sequence_length=20))
    assert report.measured_by == list(family.family.tokenizers)
    pipe = family.pipeline(deferred=True)
    limits = pipe.token_limits(20)
    found = [finding.message for finding in report.findings if finding.kind == "long caption" and finding.rows == (3,)]
    expected = {name: tokens for name in limits
                if len(tokens := getattr(pipe, name)(long).input_ids) > limits[name]}
    assert expected
    assert len(found) == len(expected)
    for name, tokens in expected.items():
        message = next(text for text in found if f"by {name}, of which {limits[name]} are seen" in text)
        assert message.startswith(f"{len(tokens)} tokens")
        # the beginning is seen; the last token that is seen marks the end
        seen = getattr(pipe, name).decode(tokens[: limits[name] - 1], skip_special_tokens=True)
        cut = message.partition("cut: '")[2].rstrip("'").removesuffix("...")
        assert "".join(long.split()).startswith("".join(seen.split()) + "".join(cut.split()))
