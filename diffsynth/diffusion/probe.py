"""Where in a network numbers stop being finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..core.errors import UserError
from .item_names import item_name


@dataclass
class FirstBad:
    """What ``first_bad_output`` finds."""

    module: str | None = None
    """Name of the first module that returned a number that is not finite; None while there is none."""


@contextmanager
def first_bad_output(network: torch.nn.Module) -> Iterator[FirstBad]:
    """Within this block every module's output is looked at, the innermost modules first; slow."""
    found = FirstBad()

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if found.module is None and not all_finite(output):
                found.module = name

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in network.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def all_finite(value: Any) -> bool:
    """Whether a nest of tensors holds neither NaN nor infinity; anything that is no tensor passes."""
    if isinstance(value, torch.Tensor):
        # float8 cannot be asked
        return not value.is_floating_point() or value.itemsize < 2 or bool(torch.isfinite(value.detach()).all())
    if isinstance(value, dict):
        return all(map(all_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(all_finite, value))
    return True


def require_finite(tensors: Mapping[str, torch.Tensor], dataset: Any, item: int) -> None:
    """Refuse what an encoder made of an item, before it is kept.

    Raises:
        UserError: a tensor holds NaN or an infinite number; names the item.
    """
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise UserError(
                f"{item_name(dataset, item)}: {name} ({str(tensor.dtype).removeprefix('torch.')}) holds numbers that "
                "are not finite, and was not kept. Look at the file; if it is sound, the encoder overflows: try "
                "--mixed_precision no.")
