"""Loss means something: held-out items, the same noise at the same noise levels, whoever computes it."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffsynth.core.errors import UserError
from diffsynth.core.random import keyed_seed
from diffsynth.diffusion.validation import SomeRows, held_out_rows, split_off
from tests.pictures import make_dataset

from .injecting import on_two_processes, spoiled
from .tiny import metrics

# at this learning rate the held-out loss goes up and down
SPLIT: dict[str, Any] = dict(validation_split=2, validation_timesteps=4, learning_rate=0.1)


def validations(output: Path) -> list[dict[str, Any]]:
    return [row for row in metrics(output) if "validation_loss" in row]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> dict[str, Any]:
    return dict(cache_path=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def validated(family, pictures, cache, tmp_path_factory) -> Path:
    """Two epochs of four trained and two held-out pictures, validated after every step."""
    output = tmp_path_factory.mktemp("validated") / "run"
    family.train(pictures, output, num_epochs=2, validation_every=1, keep_best=True, save_steps=8, **SPLIT, **cache)
    return output


def test_rows_of_the_log(validated):
    rows = validations(validated)
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        bands = row["validation_loss_by_band"]
        assert list(bands) == ["125", "375", "625", "875"]
        assert row["validation_loss"] == pytest.approx(sum(bands.values()) / 4, rel=1e-6)
    assert len({row["validation_loss"] for row in rows}) == 8, "every step changed the weights"
    losses = [row["loss"] for row in metrics(validated) if "loss" in row]
    assert len(losses) == 8
    plan = json.loads((validated / "plan.json").read_text(encoding="utf-8"))
    assert (plan["rows_found"], plan["rows_trained"], plan["rows_held_out"]) == (6, 4, 2)


def test_validation_does_not_disturb_training(family, pictures, cache, validated, tmp_path):
    family.train(pictures, tmp_path / "run", num_epochs=2, validation_every=8, save_steps=8, **SPLIT, **cache)
    assert (tmp_path / "run/step-8.safetensors").read_bytes() == (validated / "step-8.safetensors").read_bytes()
    assert [row for row in metrics(tmp_path / "run") if "loss" in row] == [
        row for row in metrics(validated) if "loss" in row]
    assert validations(tmp_path / "run")[0]["validation_loss"] == validations(validated)[-1]["validation_loss"]


def test_held_out_rows_are_never_trained_on(family, pictures, cache, tmp_path):
    run = spoiled(family, {})
    module = run.train(pictures, tmp_path / "run", num_epochs=3, dataset_repeat=2, **SPLIT, **cache)
    config = family.config(pictures, tmp_path / "run")
    dataset = family.dataset(config)
    left, held_out = split_off(dataset, 2)
    held_out_names = {dataset.row(row)["image"] for row in held_out}
    trained = [items for items, _ in module.passes if items[0] < 1_000_000]  # validation is keyed by hashes
    assert len(trained) == 3 * 2 * 4
    names = {left.row(item % len(left))["image"] for (item,) in trained}
    assert len(names) == 4
    assert not names & held_out_names
    assert names | held_out_names == {f"image_{number}.png" for number in range(6)}


def test_loss_is_the_mean_square_error_of_the_held_out_pictures(family, pictures, cache, tmp_path):
    """Computed once more from latents, keys and grid, without the training module."""
    module = family.train(pictures, tmp_path / "run", max_steps=1, save_steps=1, validation_every=1, **SPLIT, **cache)
    (row,) = validations(tmp_path / "run")
    config = family.config(pictures, tmp_path / "run", cache="off")
    dataset, whole = family.dataset(config), family.module(config)
    for name in module.trainable_models():
        setattr(whole.pipe, name, getattr(module.pipe, name))
    table = torch.zeros(2, 4)
    for index, number in enumerate(held_out_rows(dataset, 2)):
        text = json.dumps({"image": dataset.row(number)["image"]})
        key = keyed_seed(0, "held out", text)
        shared, posi, _ = whole.pipeline_inputs(whole.collate([dataset.load(number, 0)]))
        shared, posi, _ = whole.pipe.run_units(shared, posi, {})
        latents = shared["input_latents"]
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(keyed_seed(0, 0, key, "noise")))
        inputs = {name: value for name, value in {**shared, **posi}.items() if name != "noise"}
        for point, sigma in enumerate((0.125, 0.375, 0.625, 0.875)):
            with torch.no_grad():
                predicted = whole.pipe.predict_noise(
                    latents=(1 - sigma) * latents + sigma * noise, timesteps=torch.tensor([1000 * sigma]), **inputs)
            table[index, point] = (predicted - (noise - latents)).square().mean()
    assert list(row["validation_loss_by_band"].values()) == pytest.approx(table.mean(0).tolist(), rel=1e-5)
    assert row["validation_loss"] == pytest.approx(table.mean().item(), rel=1e-5)


def test_other_seeds_batches_and_objectives_give_comparable_numbers(family, pictures, cache, tmp_path):
    """With a learning rate of nearly nothing the weights are those of the base model in each of these runs."""
    found = []
    for name, options in {
        "one": {}, "seed": {"seed": 99}, "batch": {"batch_size": 3, "dataset_repeat": 2},
        "objective": {"timestep_sampling": "logit_normal", "timestep_weighting": "bell", "caption_dropout": 0.5},
        "cache": {"cache": "off"},
    }.items():
        family.train(pictures, tmp_path / name, **{
            "max_steps": 1, **SPLIT, "learning_rate": 1e-12, **({} if name == "cache" else cache), **options})
        found.append(validations(tmp_path / name)[0]["validation_loss"])
    assert found == pytest.approx([found[0]] * len(found), rel=1e-5)


def test_two_processes_come_to_the_same_number(family, pictures, cache, tmp_path):
    options = dict(max_steps=2, validation_every=1, keep_best=True, validation_split=3, validation_timesteps=3, **cache)
    family.train(pictures, tmp_path / "one", **{**options, "batch_size": 2})
    on_two_processes(functools.partial(family.train, pictures, tmp_path / "two", **options))
    one, two = validations(tmp_path / "one"), validations(tmp_path / "two")
    assert [row["step"] for row in two] == [1, 2]
    for first, second in zip(one, two, strict=True):
        assert second["validation_loss"] == pytest.approx(first["validation_loss"], rel=1e-6)
    assert (tmp_path / "two" / "best.safetensors").is_file()


def test_best_is_kept_through_a_resume(family, pictures, cache, validated, tmp_path):
    """The best of the whole run, whether it comes before or after the interruption."""
    rows = validations(validated)
    best = min(rows, key=lambda row: row["validation_loss"])
    assert [row["step"] for row in rows if row.get("best")][-1] == best["step"]
    stop = next(row["step"] for row in rows[1:] if "best" not in row) - 1
    assert 0 < stop < 8, "there must be a step that is no new best"
    options = dict(validation_every=1, keep_best=True, **SPLIT, **cache)
    family.train(pictures, tmp_path / "to", num_epochs=2, max_steps=best["step"], save_steps=best["step"], **options)
    expected = load_file(tmp_path / "to" / f"step-{best['step']}.safetensors")
    found = load_file(validated / "best.safetensors")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    output = tmp_path / "resumed"
    for last in (stop, 8):
        family.train(pictures, output, num_epochs=2, max_steps=last, save_steps=8, resume="auto", **options)
    assert metrics(output) == metrics(validated)
    assert (output / "best.safetensors").read_bytes() == (validated / "best.safetensors").read_bytes()


def test_a_stopped_run_validates_when_it_goes_on(family, pictures, cache, validated, tmp_path):
    from diffsynth.core.errors import StoppedEarly

    output, options = tmp_path / "run", dict(num_epochs=2, validation_every=1, keep_best=True, save_steps=8, **SPLIT)
    with pytest.raises(StoppedEarly):
        family.train(pictures, output, max_minutes=1e-6, **options, **cache)
    assert not validations(output)
    family.train(pictures, output, resume="auto", **options, **cache)
    assert sorted(json.dumps(row) for row in metrics(output)) == sorted(json.dumps(row) for row in metrics(validated))


def test_a_bad_loss_is_no_number_and_never_the_best(family, pictures, cache, tmp_path):
    # validation makes one forward pass per point and row: 8 after each step
    run = spoiled(family, {at: ("input", math.nan) for at in range(2, 10)})
    run.train(pictures, tmp_path / "run", max_steps=2, validation_every=1, keep_best=True, **SPLIT, **cache)
    first, second = validations(tmp_path / "run")
    assert first["validation_loss"] is None
    assert set(first["validation_loss_by_band"].values()) == {None}
    assert "best" not in first
    assert second["best"] is True


def test_rows_are_chosen_by_name_alone(family, tmp_path):
    data = make_dataset(tmp_path / "data", count=20)
    config = family.config(data, tmp_path / "run")

    def chosen(split: float, **changes: Any) -> set[str]:
        dataset = family.dataset(config.replace(**changes))
        return {dataset.row(row)["image"] for row in held_out_rows(dataset, split)}

    quarter = chosen(0.25)
    assert len(quarter) == 5
    assert quarter == chosen(5) == chosen(0.25, seed=8, dataset_repeat=3, height=64, width=64)
    assert chosen(4) < quarter
    table = data / "metadata.csv"
    header, *rows = table.read_text(encoding="utf-8").splitlines()
    rows = [row.replace("picture", "thing") for row in reversed(rows)]
    table.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    assert chosen(0.25) == quarter, "another order and other captions"
    table.write_text("\n".join([header, *rows[1:]]) + "\n", encoding="utf-8")
    assert len(chosen(5) & quarter) >= 4, "one row less moves at most one other"


@pytest.mark.parametrize("split", [6, 60, 0.99])
def test_something_must_be_left_to_train_on(family, pictures, tmp_path, split):
    with pytest.raises(UserError, match="leaves nothing to train on"):
        family.train(pictures, tmp_path / "run", validation_split=split)
    assert not (tmp_path / "run").exists()


def test_a_view_has_the_items_of_its_rows():
    class Numbers:
        num_rows = 5

        def __len__(self) -> int:
            return 10

        def __getitem__(self, item: int) -> int:
            return item

        def variant(self, item: int, epoch: int) -> tuple[int, int]:
            return item, epoch

    view = SomeRows(Numbers(), [1, 4])
    assert len(view) == 4
    assert [view[item] for item in range(4)] == [1, 4, 6, 9]
    assert view.variant(5, 7) == (14, 7), "an epoch that goes round again"
    assert not hasattr(view, "load")
    with pytest.raises(IndexError):
        view[4]


def test_a_data_set_of_ones_own_can_be_split():
    left, held_out = split_off(list(range(10)), 0.2)
    assert len(left) == 8
    assert sorted([*(left[item] for item in range(8)), *held_out]) == list(range(10))
    assert math.isclose(len(held_out), 2)
