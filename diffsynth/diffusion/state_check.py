"""What a saved state says, compared with what this run has in the same places, before any of it is taken over.

A state folder may come from somebody else. Its numbers go into ``load_state_dict`` methods that would put any name and
any value on their objects.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..core.errors import RunStopped, UserError

_MISFITS = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RuntimeError)


@contextmanager
def taking_over(place: Path) -> Iterator[None]:
    """Within this block, what does not fit is the fault of the file or folder that is taken over."""
    try:
        yield
    except (UserError, RunStopped):
        raise
    except _MISFITS as error:
        raise UserError(f"{place} does not fit this model or this run ({type(error).__name__}: {str(error)[:200]}); "
                        "give the file or folder of this run.") from error


def check_form(name: str, saved: Any, own: Any) -> None:
    """Make sure that a value has the form of the one that it replaces: names, numbers, lists in the same places.

    Args:
        name: What it is, for the message.
        saved: From the state.
        own: Of this run.
    Raises:
        UserError: it has not.
    """
    if isinstance(own, Mapping):
        more = sorted(map(str, saved.keys() - own.keys())) if isinstance(saved, Mapping) and own else []
        if not isinstance(saved, Mapping) or more:
            raise UserError(f"{name} of the state {f'holds {more[0]!r}' if more else 'has no names'}, which it should "
                            "not; the state is damaged or of another version.")
        for key, value in saved.items():
            check_form(f"{name}.{key}", value, own.get(key))
    elif isinstance(own, list | tuple):
        if not isinstance(saved, list | tuple):
            raise UserError(f"{name} of the state is no list; the state is damaged.")
        for value in saved:
            check_form(name, value, own[0] if own else 0.0)
    elif not _same_kind(saved, own):
        raise UserError(f"{name} of the state is {str(saved)[:40]!r} where this run has {str(own)[:40]!r}; the state "
                        "is damaged or of another run.")


def _same_kind(saved: Any, own: Any) -> bool:
    if isinstance(saved, torch.Tensor | bool) or isinstance(own, bool):
        return type(saved) is type(own) or own is None
    if isinstance(saved, int | float):
        return math.isfinite(saved) and (own is None or isinstance(own, int | float))
    return saved is None or own is None or (isinstance(saved, str) and isinstance(own, str))


def check_shapes(name: str, saved: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    """Make sure that tensors have the shapes of those that they replace: one number would be copied to all places.

    Raises:
        UserError: one has not.
    """
    for key, tensor in own.items():
        if key in saved and saved[key].shape != tensor.shape:
            raise UserError(f"{key} of the {name} in the state has shape {tuple(saved[key].shape)} and this run's has "
                            f"{tuple(tensor.shape)}; the state belongs to another run.")
