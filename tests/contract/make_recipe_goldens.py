"""Write the numbers that training makes of keys and options: ``python -m tests.contract.make_recipe_goldens``.

Only with a new ``RECIPE_VERSION`` may the numbers of an existing file change.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from diffsynth.core import random
from diffsynth.diffusion.loss import flow_match_sample
from diffsynth.diffusion.loss_report import watch_losses
from diffsynth.diffusion.schedule import RECIPE_VERSION
from tests.pictures import draw_picture, make_dataset

from .families import FAMILIES
from .tiny import FamilyAtWork, metrics

FOLDER = Path(__file__).parents[1] / "data" / "recipes"
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"timestep_sampling": "uniform"},
    "logit_normal": {"timestep_sampling": "logit_normal"},
    "shift": {"timestep_sampling": "uniform", "timestep_shift": 3.0},
    "bell": {"timestep_weighting": "bell"},
}
RESOLUTIONS = [(64, 48), (256, 256), (1024, 768)]
"""Height and width in pixels; the losses, which need a network, are taken at the first."""
ITEMS = [0, 7, 123_456]
TRACE: dict[str, Any] = dict(dataset_repeat=4, max_steps=20, seed=11)


def path_of(family: str) -> Path:
    return FOLDER / f"{family}.json"


def goldens(family: FamilyAtWork, folder: Path) -> dict[str, Any]:
    """All numbers of a family; ``folder`` takes what the trace writes."""
    data = make_dataset(folder / "data", count=6, sizes=[(64, 48), (48, 64)])
    cases = []
    for name, options in CONFIGURATIONS.items():
        module = family.module(family.config(data, folder / "unused", **options))
        module.pipe.require_models(module.pipe.denoiser_models)
        for number, (height, width) in enumerate(RESOLUTIONS):
            case = {"configuration": name, "height": height, "width": width, **samples(module, height, width)}
            if number == 0:
                case["losses"] = losses(module, height, width)
            cases.append(case)
    family.train(data, folder / "trace", **TRACE)
    trace = [row["loss"] for row in metrics(folder / "trace")]
    return {"recipe_version": RECIPE_VERSION, "items": ITEMS, "cases": cases, "trace": trace}


def samples(module: Any, height: int, width: int) -> dict[str, Any]:
    """Noise levels, and noisy latents and target by their first numbers and their mean square."""
    with random.keyed_items(1, 2, ITEMS):
        latents = random.normal(module.pipe.latent_shape(len(ITEMS), height, width), "golden latents")
        sample = flow_match_sample(module.pipe, latents, None)
    levels = sample.levels
    numbers = {name: getattr(levels, name).tolist() for name in ("timesteps", "sigmas", "weights")}
    for name in ("noisy_latents", "training_target"):
        tensor = getattr(sample, name)
        numbers[name] = tensor.flatten(1)[:, :4].tolist()
        numbers[f"{name}_mean_square"] = tensor.double().square().flatten(1).mean(1).tolist()
    return numbers


def losses(module: Any, height: int, width: int) -> list[float]:
    """Loss of each picture, through units and network."""
    items = [{"image": draw_picture(index, (width, height)), "prompt": f"picture {index}"} for index in range(3)]
    with torch.no_grad(), random.keyed_items(1, 2, ITEMS), watch_losses() as seen:
        mean = module(module.collate(items)).item()
    (report,) = seen.pending
    return [*report.losses.tolist(), mean]


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in FAMILIES:
        tiny = importlib.import_module(name).TINY
        with tempfile.TemporaryDirectory() as folder:
            family = FamilyAtWork(tiny, Path(folder) / "family")
            text = json.dumps(goldens(family, Path(folder)), indent=1)
        path_of(tiny.name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
