"""The networks of a model file under our names, read weight by weight: what merging and extracting work on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..core.errors import UserError
from ..core.loader import WeightReader
from ..core.loader.files import weight_groups
from ..models.keymap import Match, shapes_to_ours
from ..models.recognition import Found, assign_weights, describe_unknown, find_components
from ..models.spec import ModelFamily

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass
class BaseNetwork:
    """One network of a model file."""

    component: str
    found: Found
    reader: WeightReader

    @cached_property
    def places(self) -> dict[str, tuple[str, Match]]:
        """Our weight -> its key in the file and its place there."""
        return {ours: (key, match) for key, match in self.found.sources.items() for ours in match.ours}

    def shape(self, name: str) -> tuple[int, ...]:
        key, match = self.places[name]
        return shapes_to_ours(match.rule, self.reader.tensors[key].shape)[match.ours.index(name)]

    def get(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """One of our weights."""
        key, match = self.places[name]
        shapes = shapes_to_ours(match.rule, self.reader.tensors[key].shape)
        index = match.ours.index(name)
        tensor = torch.empty(shapes[index], dtype=dtype)
        self.reader.read_rows(key, sum(shape[0] for shape in shapes[:index]), tensor)
        if match.rule.swap_halves:
            tensor = torch.cat(list(reversed(tensor.chunk(2, dim=0))), dim=0)
        return tensor

    @property
    def config(self) -> dict[str, Any]:
        """Its configuration with the class, as a ``config.json`` holds it."""
        return {"_class_name": self.found.spec.class_path.rpartition(".")[2], **self.found.config}


@dataclass
class BaseFile:
    """Weights that are read as one: a file, or the shards of one."""

    reader: WeightReader
    networks: list[BaseNetwork]

    @property
    def stem(self) -> str:
        """Name of the file without ending and shard number, for copies of it."""
        return _SHARD.sub("", self.reader.paths[0].stem)

    def describe(self) -> str:
        return self.reader.describe()


def open_base(path: str | Path, family: ModelFamily, stack: ExitStack) -> list[BaseFile]:
    """Open whatever model a path names: a file, its shards, or a folder.

    Args:
        stack: Closes the files.
    Raises:
        UserError: nothing there is a network of this family, or one is incomplete.
    """
    files: list[BaseFile] = []
    unknown = ""
    for group in weight_groups(path):
        reader = stack.enter_context(WeightReader(group))
        found = find_components(reader, [component.spec for component in family.components])
        assign_weights(reader.tensors, found, [part.expected_names() for part in found])
        names = {component.spec.kind: component.name for component in family.components}
        for part in found:
            _check_complete(part, reader)
        if found:
            files.append(BaseFile(reader, [BaseNetwork(names[part.spec.kind], part, reader) for part in found]))
        else:
            unknown = f"; {describe_unknown(reader.tensors)}"
    if not files:
        raise UserError(f"{path} holds no network of {family.name}{unknown}.")
    return files


def base_file_with(files: Iterable[BaseFile], components: Iterable[str], path: str | Path) -> BaseFile:
    """The one file that holds all of these networks.

    Raises:
        UserError: none does, or they are spread over several.
    """
    listed, wanted = list(files), list(components)
    holding = [file for file in listed if set(wanted) & {network.component for network in file.networks}]
    held = ", ".join(network.component for file in listed for network in file.networks)
    absent = [name for name in wanted if name not in held.split(", ")]
    if absent:
        raise UserError(f"{path} holds {held} and no {' or '.join(absent)}, which the LoRA changes; give a model that "
                        "holds all of it, or name with --components what is to be merged.")
    if len(holding) != 1:
        places = ", ".join(file.describe() for file in holding)
        raise UserError(f"the networks {' and '.join(wanted)} of {path} are in {len(holding)} files ({places}); "
                        "merge into one after the other, naming each with --components.")
    return holding[0]


def recognise_base(path: str | Path) -> list[str]:
    """Names of the families that a network in these files belongs to."""
    from ..models.registry import all_families

    fitting: dict[str, int] = {}
    for group in weight_groups(path):
        with WeightReader(group) as reader:
            for family in all_families():
                found = find_components(reader, [component.spec for component in family.components])
                own = sum(part.spec.family == family.name for part in found)
                if found:
                    fitting[family.name] = fitting.get(family.name, 0) + own
    best = max(fitting.values(), default=0)
    return [name for name, own in fitting.items() if own == best]


def config_beside(file: BaseFile) -> dict[str, Any] | None:
    """The ``config.json`` in the folder of a network, where there is one."""
    path = file.reader.paths[0].parent / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _check_complete(found: Found, reader: WeightReader) -> None:
    for names, what in ((found.missing, "lacks"), (found.unexpected, "has too many:")):
        if names:
            raise UserError(f"{reader.describe()} {what} {len(names)} weights of {found.spec.kind}, for example "
                            f"{', '.join(names[:3])}; the file is incomplete or of another version of this model.")
