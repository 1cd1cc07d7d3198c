"""``diffsynth replay``: run a bad step again from its replay file, and say where the numbers go wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ..config import TrainConfig
from ..core.errors import UserError
from ..core.options import Options, PathList

if TYPE_CHECKING:
    from ..diffusion.replay import Replay
    from ..diffusion.training_module import PipelineTrainingModule


class ReplayConfig(Options):
    """Run a step again that gave NaN or infinity, and say which module returns such a number first."""

    title: ClassVar[str] = "What to replay"
    file: str = Field(
        min_length=1, description="File of a run's replay folder.",
        json_schema_extra={"positional": True, "metavar": "FILE"},
    )
    model_paths: PathList = Field(
        (), description="Paths of the models, where they are not those of the run any more; as for training."
    )
    device: str | None = Field(None, description="cpu, cuda, ... Left out: as in the run.")
    as_json: bool = Field(False, description="Print JSON instead of a table.", json_schema_extra={"option": "json"})


def report(options: ReplayConfig) -> None:
    """Replay a file and write what was seen to the standard output."""
    result = replay(options)
    if options.as_json:
        sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    else:
        _write_table(result)


def replay(options: ReplayConfig) -> dict[str, Any]:
    """Build the model as it was, with the trained weights of the step, and repeat forward and backward.

    Returns:
        Plain values. ``batches``: for each forward pass its loss now and in the run, the first module with a bad
        output, and each item alone. Numbers that are not finite are given as text.
    Raises:
        UserError: the file is no replay file, or the models are missing or others than the run's.
    """
    from ..diffusion.replay import read_replay
    from ..diffusion.runner import dtypes_left_to_autocast
    from ..diffusion.state_check import taking_over
    from .run import build_accelerator, build_model, choose_family, inspect_configs, model_configs

    path = Path(options.file)
    if not path.is_file():
        raise UserError(f"there is no file {path}.")
    held = read_replay(path)
    config = _config_of(held, options, path)
    configs = model_configs(config)
    family = choose_family(config.family, inspect_configs(configs))
    accelerator = build_accelerator(config)
    module = build_model(config, family, configs, accelerator.device)
    _put_weights_in(module, held, path)
    module.prefix_cached = held.document["cached"]
    if module.prefix_cached:
        module.pipe.release(module.prefix.released_models)
    network = accelerator.prepare_model(module)
    with dtypes_left_to_autocast(accelerator, module, config), taking_over(path):
        batches = [_replay_batch(module, network, held.document, index, data)
                   for index, data in enumerate(held.batches)]
    return {name: held.document[name] for name in ("step", "epoch", "loss", "grad_norm", "torch", "device")} | {
        "reproduced": all(batch["loss"] == batch["loss_in_the_run"] for batch in batches), "batches": batches}


def _config_of(held: Replay, options: ReplayConfig, path: Path) -> TrainConfig:
    config = TrainConfig(**held.document["config"])
    # the trained weights lie in the file; where they once started from does not matter
    changes: dict[str, Any] = {"lora_checkpoint": None, "task": "sft", "sample_prompts": ()}
    if options.model_paths:
        changes |= {"model_paths": options.model_paths, "model_id_with_origin_paths": ()}
    if options.device is not None:
        changes["device"] = options.device
    missing = [name for entry in changes.get("model_paths", config.model_paths)
               for name in ([entry] if isinstance(entry, str) else entry) if not Path(name).exists()]
    if missing:
        raise UserError(f"{path} needs the model {missing[0]}, which is not there; say where the models are with "
                        "--model_paths.")
    return config.replace(**changes)


def _put_weights_in(module: PipelineTrainingModule, held: Replay, path: Path) -> None:
    import torch

    from ..diffusion.state_check import check_shapes

    models = module.pipe.component_fingerprints
    for name, fingerprint in held.document["base_models"].items():
        if models.get(name, fingerprint) != fingerprint:
            raise UserError(f"the {name} that was given is not the one of the run of {path}; give the same files.")
    parameters = module.trainable_parameters()
    if other := sorted(set(parameters) ^ set(held.weights)):
        raise UserError(f"{path} does not fit its own configuration ({other[0]} is only in one of them).")
    check_shapes("weights", held.weights, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(held.weights[name])


def _replay_batch(
    module: PipelineTrainingModule, network: Any, document: dict[str, Any], index: int, data: Any
) -> dict[str, Any]:
    from ..diffusion.probe import all_finite

    entry = document["batches"][index]
    whole = _forward_and_backward(module, network, document, entry["keys"], data)
    items = []
    for row, (key, name) in enumerate(zip(entry["keys"], entry["names"], strict=True)):
        one = {column: values[row : row + 1] for column, values in data.items()}
        alone = whole if len(entry["keys"]) == 1 else _forward_and_backward(module, network, document, [key], one)
        items.append({"name": name, "timestep": next(iter(alone["timesteps"]), "unknown"), "loss": alone["loss"],
                      "grad_norm": alone["grad_norm"], "first_bad_module": alone["first_bad_module"]})
    bad_inputs = [name for name, value in data.items() if not all_finite(value)]
    return {"loss_in_the_run": entry["loss"], **whole, "bad_inputs": bad_inputs, "items": items}


def _forward_and_backward(
    module: PipelineTrainingModule, network: Any, document: dict[str, Any], keys: list[int], data: Any
) -> dict[str, Any]:
    import torch

    from ..core import random
    from ..diffusion.loss_report import watch_losses
    from ..diffusion.probe import first_bad_output

    parameters = module.trainable_parameters()
    module.zero_grad()
    with (random.keyed_items(document["seed"], document["epoch"], keys), watch_losses() as seen,
          first_bad_output(module) as first):
        loss = network(data)
    (loss * document["scale"]).backward()
    gradients = {name: parameter.grad.float() / document["scale"]
                 for name, parameter in parameters.items() if parameter.grad is not None}
    norms = {name: gradient.norm() for name, gradient in gradients.items()}
    return {
        "loss": _number(loss), "grad_norm": _number(torch.stack(list(norms.values())).norm()),
        "first_bad_module": first.module,
        "bad_gradients": [name for name, norm in norms.items() if not torch.isfinite(norm)],
        "timesteps": [value for report in seen.pending for value in report.timesteps.tolist()],
        "dtypes": {name: str(dtype).removeprefix("torch.")
                   for report in seen.pending for name, dtype in report.dtypes.items()},
    }


def _number(value: Any) -> float | str:
    import math

    number = float(value.detach())
    return number if math.isfinite(number) else str(number)


def _write_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False, markup=False)  # names of files may look like markup
    same = "the same numbers as in the run" if result["reproduced"] else "other numbers than in the run"
    console.print(f"step {result['step']}: loss {_shown(result['loss'])}, gradient norm "
                  f"{_shown(result['grad_norm'])}; replayed: {same}")
    for batch in result["batches"]:
        table = Table("item", "timestep", "loss", "gradient norm", "first module that is not finite")
        for item in batch["items"]:
            table.add_row(item["name"], _shown(item["timestep"]), _shown(item["loss"]), _shown(item["grad_norm"]),
                          item["first_bad_module"] or "-")
        console.print(table)
        dtypes = ", ".join(f"{name} {dtype}" for name, dtype in batch["dtypes"].items())
        console.print(f"loss {_shown(batch['loss'])} (in the run {_shown(batch['loss_in_the_run'])}), {dtypes}")
        if batch["bad_inputs"]:
            console.print(f"not finite before the network: {', '.join(batch['bad_inputs'])}")
        elif batch["bad_gradients"]:
            console.print(f"gradients that are not finite: {len(batch['bad_gradients'])}, for example "
                          f"{batch['bad_gradients'][0]}")


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
