"""Builders of optimizers and learning-rate schedules from the run's options."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch

from ..config import TrainConfig
from ..core.errors import UserError, did_you_mean


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that ``config.optimizer`` names: one of ``torch.optim``, or any dotted class.

    Raises:
        UserError: the class does not exist or refuses its arguments.
    """
    cls = optimizer_class(config.optimizer)
    arguments: dict[str, Any] = {"lr": config.learning_rate}
    accepted = inspect.signature(cls).parameters
    if "weight_decay" in accepted:
        arguments["weight_decay"] = config.weight_decay
    arguments.update(config.optimizer_args)
    takes_anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    unknown = sorted(set(arguments) - set(accepted))
    if unknown and not takes_anything:
        raise UserError(f"optimizer_args: {config.optimizer} takes no argument {unknown[0]!r}."
                        f"{did_you_mean(unknown[0], accepted)}")
    try:
        return cls(list(parameters), **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer {config.optimizer} refused its arguments {arguments}: {error}") from error


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    module_name, _, class_name = name.rpartition(".")
    try:
        module = importlib.import_module(module_name or "torch.optim")
    except ImportError as error:
        raise UserError(
            f"optimizer {name!r}: cannot import {module_name!r} ({error}); is its package installed?"
        ) from error
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type):
        names = [n for n, value in vars(module).items() if isinstance(value, type)]
        raise UserError(f"optimizer {name!r}: {module.__name__} has no class {class_name!r}."
                        f"{did_you_mean(class_name, names)}")
    closure = inspect.signature(cls.step).parameters.get("closure")  # type: ignore[attr-defined]
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(f"optimizer {name!r} evaluates the loss several times in one step, which this loop does not "
                        "do; use AdamW or another first-order optimizer.")
    return cls


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up, then the course that ``config.lr_scheduler`` names, as a function of the optimizer step."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, _LearningRateFactor(config.lr_scheduler, config.lr_warmup_steps, total_steps)
    )


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
