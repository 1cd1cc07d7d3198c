"""Every set of options that a command, a script or Python can be given, found in the package itself."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import random
import re
import string
from collections.abc import Iterator, Mapping

import diffsynth
from diffsynth.cli import COMMANDS, Command, Group
from diffsynth.core.command_line import is_positional, option_name
from diffsynth.core.options import Options

ALPHABET = string.ascii_lowercase + "_"


def schemas() -> dict[str, type[Options]]:
    """Name -> class of every set of options that no other set of the package builds on."""
    for module in pkgutil.walk_packages(diffsynth.__path__, "diffsynth."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found = [cls for cls in _below(Options) if cls.__module__.startswith("diffsynth.")]
    leaves = [cls for cls in found if not any(other is not cls and issubclass(other, cls) for other in found)]
    return {cls.__name__: cls for cls in sorted(leaves, key=lambda cls: cls.__name__)}


def _below(cls: type[Options]) -> Iterator[type[Options]]:
    for derived in cls.__subclasses__():
        yield derived
        yield from _below(derived)


def commands(known: Mapping[str, Command | Group] = COMMANDS, called: str = "") -> dict[str, Command]:
    """``lora merge`` and the like -> command."""
    found: dict[str, Command] = {}
    for name, entry in known.items():
        if isinstance(entry, Group):
            found |= commands(entry.commands, f"{called}{name} ")
        else:
            found[f"{called}{name}"] = entry
    return found


def schema_of(command: Command) -> str:
    """Name of the class that a command reads its words by."""
    named = re.findall(r"(\w+)\.from_command_line\(", inspect.getsource(command.run))
    assert len(set(named)) == 1, f"{command.run.__name__} reads its words by {named}; it is to be one set of options"
    return named[0]


def typed_names(options: type[Options]) -> dict[str, str]:
    """What is typed after the dashes -> field."""
    return {option_name(name, field): name for name, field in options.model_fields.items() if not is_positional(field)}


def typos(name: str) -> list[str]:
    """Every word that is one slip away: a letter left out, added, replaced, or two swapped; never a name's own."""
    slips = {name[:i] + name[i + 1:] for i in range(len(name))}
    slips |= {name[:i] + letter + name[i:] for i in range(len(name) + 1) for letter in ALPHABET}
    slips |= {name[:i] + letter + name[i + 1:] for i in range(len(name)) for letter in ALPHABET}
    slips |= {name[:i] + name[i + 1] + name[i] + name[i + 2:] for i in range(len(name) - 1)}
    return sorted(slips - {name, ""})


def sampled_typos(name: str, count: int) -> list[str]:
    """``count`` of the typos, or all, drawn alike on every machine."""
    every = typos(name)
    return every if len(every) <= count else random.Random(name).sample(every, count)
