"""Configuration that comes with a file: believed where it fits the weights, and never more than plain values.

A ``config.json`` is as foreign as the weights beside it. Its classes and code (``auto_map``) are not looked at, and a
number in it cannot make a network larger than the weights are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ..core.errors import UserError
from ..core.loader.files import read_json
from ..core.loader.reader import WeightReader

_NOT_CONFIGURATION = ("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "auto_map")
_COUNTS = ("layers", "blocks", "depth", "num_")
MAX_COUNT = 1024
MAX_NUMBER = 2**24


def given_config(reader: WeightReader, class_name: str, shown: Mapping[str, Any], alone: bool) -> dict[str, Any]:
    """Configuration in the file's metadata, else in a ``config.json`` beside it that is about this class.

    Args:
        class_name: Of the network.
        shown: What shapes and the family's constants say.
        alone: Whether the file holds this network only, so that a ``config.json`` beside it is about it.
    Raises:
        UserError: it is no plain JSON object, or describes a network that these weights cannot be of.
    """
    if "config" in reader.metadata:
        origin = f"the metadata of {reader.describe()}"
        given = _parse(reader.metadata["config"], origin)
        if given.get("_class_name", class_name) == class_name and (set(given) & set(shown)):
            return _checked(given, shown, origin)
    beside = reader.paths[0].parent / "config.json"
    if alone and beside.is_file():
        given = _object(read_json(beside), str(beside))
        architectures = given.get("architectures")
        if class_name in [given.get("_class_name"), *(architectures if isinstance(architectures, list) else [])]:
            return _checked(given, shown, str(beside))
    return {}


def _parse(text: str, origin: str) -> dict[str, Any]:
    try:
        return _object(json.loads(text), origin)
    except RecursionError as error:
        raise UserError(f"the configuration in {origin} is nested without end; repair or remove it.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"the configuration in {origin} is no JSON ({error}); repair or remove it.") from error


def _object(config: Any, origin: str) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise UserError(f"the configuration in {origin} is no JSON object; repair or remove it.")
    return config


def _checked(given: Mapping[str, Any], shown: Mapping[str, Any], origin: str) -> dict[str, Any]:
    chosen = {key: value for key, value in given.items()
              if not key.startswith("_") and key not in _NOT_CONFIGURATION and not isinstance(value, dict)
              and not (value is None and key in shown)}
    for key, value in chosen.items():
        if not _fits(key, value, shown.get(key)):
            found = f", whose weights say {shown[key]!r}" if key in shown else ""
            raise UserError(f"the configuration in {origin} says {key} = {_short(value)}{found}; it belongs to another "
                            "model: repair or remove it.")
    return chosen


def _fits(key: str, value: Any, shown: Any) -> bool:
    """Whether a value can be meant for these weights: of the same kind as ``shown`` and of no absurd size."""
    if isinstance(shown, list | tuple):
        return isinstance(value, list) and len(value) == len(shown) and all(
            _fits(key, part, own) for part, own in zip(value, shown, strict=True))
    if isinstance(value, list):
        return shown is None and len(value) <= MAX_COUNT and all(_fits(key, part, None) for part in value)
    if isinstance(value, bool) or isinstance(shown, bool):
        return isinstance(value, bool) and (shown is None or isinstance(shown, bool))
    if isinstance(value, int | float):
        if not math.isfinite(value) or isinstance(shown, str) or (isinstance(shown, int) and isinstance(value, float)):
            return False
        most = MAX_COUNT if any(part in key for part in _COUNTS) else MAX_NUMBER
        return 0 <= value <= max(MAX_COUNT, 4 * shown) if isinstance(shown, int) else abs(value) <= most
    return value is None or shown is None or (isinstance(value, str) and isinstance(shown, str))


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, int | float | str) else type(value).__name__
    return text[:60]
