"""A witness: two sets of options that differ in one option, and what is looked at to see that it does something."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffsynth.core.errors import RunStopped, StoppedEarly, UserError

if TYPE_CHECKING:
    from .lab import Lab

Look = Callable[["Lab", dict[str, Any]], Any]
"""Sets something up from options by the public way, and returns what it does."""


@dataclass(frozen=True)
class Witness:
    """Without ``value`` and with it, ``look`` sees different things."""

    option: str
    value: Any
    """Another value than the default; a function of the lab where it is a file made there."""
    look: Look
    seen: Callable[[Any], Any] = lambda result: result
    """The part of the result that the option is to change."""
    base: Any = field(default_factory=dict)
    """Options of both sides; a function of the lab where there are files among them."""
    refused: str | None = None
    """Where one of the sides ends in a refusal: what the refusal says."""

    def sides(self, lab: Lab) -> tuple[dict[str, Any], dict[str, Any]]:
        base = dict(made(self.base, lab))
        return base, {**base, self.option: made(self.value, lab)}


@dataclass(frozen=True)
class Refusal:
    message: str


def made(value: Any, lab: Lab) -> Any:
    return value(lab) if callable(value) else value


class Observer:
    """Looks at sets of options, at each once."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._known: dict[tuple[Look, str], Any] = {}

    def __call__(self, look: Look, options: Mapping[str, Any]) -> Any:
        key = (look, repr(sorted(options.items())))
        if key not in self._known:
            self._known[key] = self.anew(look, options)
        return self._known[key]

    def anew(self, look: Look, options: Mapping[str, Any]) -> Any:
        try:
            return look(self.lab, dict(options))
        except (UserError, RunStopped, StoppedEarly) as error:
            return Refusal(re.sub(r"fresh-\d+", "fresh", str(error)))
