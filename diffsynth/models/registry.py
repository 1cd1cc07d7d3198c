"""The families and shared components by dotted name; nothing is imported until it is asked for."""

from __future__ import annotations

import importlib
from functools import cache

from ..core.errors import UserError, did_you_mean
from .spec import ComponentSpec, ModelFamily

FAMILY_MODULES: dict[str, str] = {"flux": "diffsynth.pipelines.flux"}


@cache
def get_family(name: str) -> ModelFamily:
    """The family called ``name``.

    Raises:
        UserError: no family has that name.
    """
    if name not in FAMILY_MODULES:
        raise UserError(f"there is no model family {name!r}; known: {', '.join(FAMILY_MODULES)}."
                        f"{did_you_mean(name, FAMILY_MODULES)}")
    return importlib.import_module(FAMILY_MODULES[name]).FAMILY


def all_families() -> list[ModelFamily]:
    return [get_family(name) for name in FAMILY_MODULES]


def all_component_specs() -> list[ComponentSpec]:
    """Every known network once, in the order of the families."""
    specs = {component.spec.kind: component.spec for family in all_families() for component in family.components}
    return list(specs.values())
