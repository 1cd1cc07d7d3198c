"""Telling operators apart in a cache key, across processes and runs."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from ..errors import UserError
from .operators import Call, Operator


def describe(part: Any, leave_out: Collection[Operator] = ()) -> str:
    """A text that is equal for operators that do the same, in this process or another; part of cache keys.

    Args:
        leave_out: Steps of chains that do nothing.
    """
    if isinstance(part, Call):
        return f"Call({describe(part.function)})"
    if isinstance(part, Operator) and is_dataclass(part):
        values = ", ".join(f"{f.name}={describe(getattr(part, f.name), leave_out)}" for f in fields(part) if f.repr)
        return f"{type(part).__qualname__}({values})"
    if isinstance(part, tuple | list):
        kept = [element for element in part if not (isinstance(element, Operator) and element in leave_out)]
        return f"[{', '.join(describe(element, leave_out) for element in kept)}]"
    if isinstance(part, type):
        return f"{part.__module__}.{part.__qualname__}"
    if part is None or isinstance(part, str | int | float | bool | Path):
        return repr(part)
    code = getattr(part, "__code__", None)
    if isinstance(code, CodeType):
        cells = [cell.cell_contents for cell in part.__closure__ or ()]
        bound = describe([cells, part.__defaults__, sorted((part.__kwdefaults__ or {}).items())])
        return f"{part.__module__}.{part.__qualname__}:{_digest(_code_parts(code))}{bound}"
    try:
        state = pickle.dumps(part, protocol=4)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"The operator {part!r} cannot be pickled ({error}); define it at the top of a module."
        ) from error
    return f"{type(part).__qualname__}:{_digest(state)}"


def _code_parts(code: CodeType) -> bytes:
    constants = [_constant(constant) for constant in code.co_consts]
    return b"|".join([code.co_code, " ".join(code.co_names).encode(), *constants])


def _constant(constant: Any) -> bytes:
    if isinstance(constant, CodeType):
        return _code_parts(constant)
    # the order of a set of strings differs from process to process
    return repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant).encode()


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()
