"""Builders of optimizers and learning-rate schedules from the run's options."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import site
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..config import TrainConfig
from ..core.errors import UserError, did_you_mean
from ..core.options import COMMAND_LINE, DEFAULT, PYTHON


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that ``config.optimizer`` names: one of ``torch.optim``, or any dotted class.

    Raises:
        UserError: the class does not exist or refuses its arguments.
    """
    cls = optimizer_class(config.optimizer, trusted=config.origins["optimizer"] in (DEFAULT, COMMAND_LINE, PYTHON))
    arguments: dict[str, Any] = {"lr": config.learning_rate}
    accepted = inspect.signature(cls).parameters
    takes_anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    decay_is_given = config.weight_decay != type(config).model_fields["weight_decay"].default
    if "weight_decay" in accepted or (takes_anything and decay_is_given):
        arguments["weight_decay"] = config.weight_decay
    elif decay_is_given:
        raise UserError(f"--weight_decay has no effect on {config.optimizer}, which has none; leave it out.")
    if "lr" in config.optimizer_args:
        raise UserError("optimizer_args: lr is the option --learning_rate; set that.")
    if decay_is_given and "weight_decay" in config.optimizer_args:
        raise UserError("weight_decay is given twice, by itself and in optimizer_args; leave one of them out.")
    arguments.update(config.optimizer_args)
    unknown = sorted(set(arguments) - set(accepted))
    if unknown and not takes_anything:
        raise UserError(f"optimizer_args: {config.optimizer} takes no argument {unknown[0]!r}."
                        f"{did_you_mean(unknown[0], accepted)}")
    try:
        return cls(list(parameters), **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer {config.optimizer} refused its arguments {arguments}: {error}") from error


def optimizer_class(name: str, trusted: bool = True) -> type[torch.optim.Optimizer]:
    """The class of a dotted name, or of a name in ``torch.optim``.

    Args:
        trusted: Whether the name was given by hand. One from a file may not import what is not installed as a package:
            a downloaded folder could hold the configuration and the code.
    """
    module_name, _, class_name = name.rpartition(".")
    if not trusted and module_name and not _is_installed(module_name.partition(".")[0]):
        raise UserError(f"optimizer {name!r} stands in a file and is no class of an installed package, so it was not "
                        f"imported; if you trust it, give it by hand: --optimizer {name}.")
    try:
        module = importlib.import_module(module_name or "torch.optim")
    except (ImportError, TypeError, ValueError) as error:
        raise UserError(
            f"optimizer {name!r}: cannot import {module_name!r} ({error}); is its package installed?"
        ) from error
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type):
        names = [n for n, value in vars(module).items() if isinstance(value, type)]
        raise UserError(f"optimizer {name!r}: {module.__name__} has no class {class_name!r}."
                        f"{did_you_mean(class_name, names)}")
    if not issubclass(cls, torch.optim.Optimizer):
        raise UserError(f"optimizer {name!r} is no optimizer of PyTorch; name a class derived from "
                        "torch.optim.Optimizer.")
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(f"optimizer {name!r} evaluates the loss several times in one step, which this loop does not "
                        "do; use AdamW or another first-order optimizer.")
    return cls


def _is_installed(package: str) -> bool:
    """Whether a package lies where installers put packages, told without importing it."""
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    places = [Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")]
    places.append(Path(site.getusersitepackages()).resolve())
    origins = [*(found.submodule_search_locations or ()), found.origin] if found else []
    files = [Path(origin).resolve() for origin in origins if origin]
    return any(place in file.parents for file in files for place in places)


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up, then the course that ``config.lr_scheduler`` names, as a function of the optimizer step."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, _LearningRateFactor(config.lr_scheduler, config.lr_warmup_steps, total_steps)
    )
    # a first step may be left out; torch would warn that the schedule moved on without the optimizer
    optimizer.__dict__["_opt_called"] = True
    return scheduler


def continue_lr_scheduler(
    scheduler: torch.optim.lr_scheduler.LambdaLR, state: dict[str, Any], total_steps: int
) -> None:
    """Go on from a saved schedule, over a run that may have got another length meanwhile."""
    scheduler.load_state_dict(state)
    factor = scheduler.lr_lambdas[0]
    assert isinstance(factor, _LearningRateFactor)
    if factor.total_steps != total_steps:
        factor.total_steps = total_steps
        rates = [base * factor(scheduler.last_epoch) for base in scheduler.base_lrs]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates


class _LearningRateFactor:
    """Factor on the learning rate at an optimizer step, counted from 0."""

    def __init__(self, name: str, warmup_steps: int, total_steps: int) -> None:
        self.name, self.warmup_steps, self.total_steps = name, warmup_steps, total_steps

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.name.startswith("constant"):
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return 1 - done if self.name == "linear" else 0.5 * (1 + math.cos(math.pi * done))
