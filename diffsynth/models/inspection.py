"""What is in a file: networks, their configuration, and what is missing; from the header alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.loader.files import weight_groups
from ..core.loader.reader import WeightReader
from .recognition import Found, assign_weights, describe_unknown, find_components
from .registry import all_component_specs, all_families
from .spec import ComponentSpec


def inspect_files(paths: Path | str | Sequence[Path | str]) -> dict[str, Any]:
    """Describe weight files without reading weights.

    Args:
        paths: A file, a folder of a network or of a whole model, or the list of the shards of one network.
    Returns:
        ``{"components": [{"name", "family", "class", "config", "num_parameters", "missing", "unexpected", "layout",
        "kind", "files"}, ...], "unrecognised": [names of weights that belong to no network]}``, JSON-able.
    Raises:
        UserError: a file is unreadable, or none holds a known network (lists what it holds).
    """
    specs = all_component_specs()
    components: list[dict[str, Any]] = []
    unrecognised: list[str] = []
    unknown: str | None = None
    for group in weight_groups(paths):
        with WeightReader(group) as reader:
            found = find_components(reader, specs)
            unrecognised += assign_weights(reader.tensors, found, [part.expected_names() for part in found])
            components += [_describe(part, reader) for part in found]
            if not found:
                unknown = f"{reader.describe()} holds no known network; {describe_unknown(reader.tensors)}."
    if not components:
        raise UserError(unknown or f"{paths} holds no weights.")
    return {"components": components, "unrecognised": unrecognised}


def _describe(found: Found, reader: WeightReader) -> dict[str, Any]:
    sizes = {key: math.prod(reader.tensors[key].shape) for key in found.sources}
    present = {ours: size for key, size in sizes.items() for ours in found.sources[key].ours}
    twice = sum(present[name] for name, other in found.spec.tied.items() if name in present and other in present)
    return {
        "name": found.spec.default_name,
        "family": found.spec.family or _first_family(found.spec),
        "class": found.spec.class_path.rpartition(".")[2],
        "config": {key: list(value) if isinstance(value, tuple) else value for key, value in found.config.items()},
        "num_parameters": sum(sizes.values()) - twice,
        "missing": found.missing,
        "unexpected": found.unexpected,
        "kind": found.spec.kind,
        "layout": found.layout.name,
        "dtypes": sorted({str(reader.tensors[key].dtype).removeprefix("torch.") for key in found.sources}),
        "files": [str(path) for path in reader.paths],
    }


def _first_family(spec: ComponentSpec) -> str:
    """Networks that several families share are listed under the first that uses them."""
    names = [family.name for family in all_families() for component in family.components
             if component.spec.kind == spec.kind]
    return names[0] if names else ""
