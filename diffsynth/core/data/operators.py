"""Composable operators: what turns the value of a metadata column into what the training module receives.

Operators are joined with ``>>`` and are small frozen dataclasses, so that they can be compared, printed into a cache
key and sent to spawned workers. A plain function of one value may stand anywhere in a chain.

Besides being applied, an operator can be *planned*: followed without opening a file, which tells which file a row
reads and how large the picture will come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image

from ..errors import UserError
from ..random import keyed_generator
from .files import path_inside


@dataclass(frozen=True)
class Draw:
    """Which of its variants every random operator shall produce for one row."""

    seed: int
    row: int
    digits: Mapping[str, int]
    """For each purpose ("flip", "crop"), which variant."""

    def generator(self, purpose: str) -> torch.Generator:
        return keyed_generator(self.seed, "augmentation", purpose, self.row, self.digits[purpose])

    def describe(self, operator: RandomOperator) -> str:
        """A text that is equal where ``operator`` produces the same; part of cache keys."""
        key = (self.seed, self.row) if operator.uses_generator else ()
        return f"{operator.purpose}{(*key, self.digits[operator.purpose])}"


class PlannedFile(NamedTuple):
    """A file that an operator will read, and what happens to the size of its picture."""

    base: Path | None
    """The folder it must lie in; None when the operator was given a path without one."""
    name: str
    resizers: tuple[Any, ...] | None = None
    """Operators with ``output_size``, in order; None when it is not a picture of known size."""
    is_loaded: bool = False

    def path(self) -> Path:
        """Where the file is; UserError when that is outside its folder."""
        return Path(self.name) if self.base is None else path_inside(self.base, self.name)


class Operator:
    """Base of all operators. Subclasses implement ``apply``; those that can be planned, ``plan`` as well."""

    keeps_size: ClassVar[bool] = False
    """Whether a picture leaves this operator with the height and width it came with."""
    opens_path: ClassVar[bool] = False
    """Whether this operator opens the file that it is given the path of."""

    def apply(self, value: Any) -> Any:
        raise NotImplementedError

    def plan(self, value: Any) -> Any:
        """``apply`` without opening files; see ``PlannedFile``."""
        if isinstance(value, PlannedFile):
            return value if self.keeps_size else PlannedFile(value.base, value.name, None, True)
        return value

    def children(self) -> Sequence[Operator]:
        """The operators that this one is made of."""
        return ()

    def variants(self) -> dict[str, int]:
        """For each purpose of randomness, how many variants there are; empty when there is no randomness."""
        found: dict[str, int] = {}
        for child in self.children():
            for purpose, count in child.variants().items():
                found[purpose] = max(count, found.get(purpose, 1))
        return found

    def __call__(self, value: Any, draw: Draw | None = None) -> Any:
        return self.apply(value)

    def __rshift__(self, other: Operator | Callable[[Any], Any]) -> Chain:
        return chain(self, other)

    def __rrshift__(self, other: Callable[[Any], Any]) -> Chain:
        return chain(other, self)


class RandomOperator(Operator):
    """An operator with a bounded number of random variants.

    Operators with the same ``purpose`` draw the same numbers for a row, whatever the column: a picture and its control
    picture are flipped and cropped alike.
    """

    purpose: ClassVar[str]
    num_variants: ClassVar[int]
    uses_generator: ClassVar[bool] = True
    """False when the number of the variant alone decides, whatever the seed and the row."""

    def apply_random(self, value: Any, variant: int, generator: torch.Generator | None) -> Any:
        """Produce one variant, drawing only from ``generator``."""
        raise NotImplementedError

    def is_idle(self, variant: int) -> bool:
        """Whether this variant leaves every value as it is, as if the operator were not there."""
        return False

    def variants(self) -> dict[str, int]:
        return {self.purpose: self.num_variants}

    def __call__(self, value: Any, draw: Draw | None = None) -> Any:
        if draw is None:
            # by hand, outside a data set: torch's global generator, like any other torch program
            return self.apply_random(value, int(torch.randint(self.num_variants, (1,))), None)
        generator = draw.generator(self.purpose) if self.uses_generator else None
        return self.apply_random(value, draw.digits[self.purpose], generator)


@dataclass(frozen=True)
class Call(Operator):
    """A plain function of one value."""

    function: Callable[[Any], Any]

    def apply(self, value: Any) -> Any:
        return self.function(value)


@dataclass(frozen=True)
class Chain(Operator):
    """Operators applied one after the other; ``a >> b`` makes one."""

    steps: tuple[Operator, ...]

    def __call__(self, value: Any, draw: Draw | None = None) -> Any:
        for step in self.steps:
            value = step(value, draw)
        return value

    def apply(self, value: Any) -> Any:
        return self(value)

    def plan(self, value: Any) -> Any:
        for step in self.steps:
            value = step.plan(value)
        return value

    def children(self) -> Sequence[Operator]:
        return self.steps


def as_operator(function: Operator | Callable[[Any], Any]) -> Operator:
    if isinstance(function, Operator):
        return function
    if not callable(function):
        raise UserError(f"{function!r} is not an operator; give an Operator or a function of one value.")
    return Call(function)


def chain(*operators: Operator | Callable[[Any], Any]) -> Chain:
    """The operators one after the other."""
    steps: list[Operator] = []
    for operator in map(as_operator, operators):
        steps.extend(operator.steps if isinstance(operator, Chain) else [operator])
    return Chain(tuple(steps))


class _Light(Operator):
    """An operator that opens nothing, so that planning may run it."""

    def plan(self, value: Any) -> Any:
        return value if isinstance(value, PlannedFile) else self.apply(value)


@dataclass(frozen=True)
class Identity(_Light):
    """The value as it is."""

    keeps_size: ClassVar[bool] = True

    def apply(self, value: Any) -> Any:
        return value


@dataclass(frozen=True)
class ToInt(_Light):
    """The value as an integer."""

    def apply(self, value: Any) -> int:
        try:
            return int(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{str(value)[:80]!r} is not a whole number.") from error


@dataclass(frozen=True)
class ToStr(_Light):
    """The value as text; ``none_value`` where there is none."""

    none_value: str = ""

    def apply(self, value: Any) -> str:
        return self.none_value if value is None else str(value)


@dataclass(frozen=True)
class ToList(_Light):
    """The value in a list of one; a list stays itself."""

    def apply(self, value: Any) -> list[Any]:
        return list(value) if isinstance(value, list | tuple) else [value]

    def plan(self, value: Any) -> Any:
        return self.apply(value)


@dataclass(frozen=True)
class ToAbsolutePath(Operator):
    """A file name from the metadata as an absolute path, refused when it leads out of the folder."""

    # not part of the printed form: a data set that moved is still the same
    base_path: str | Path = field(default="", repr=False)
    """By default that of the data set, or the working directory outside one."""

    def __post_init__(self) -> None:
        if self.base_path:
            object.__setattr__(self, "base_path", Path(self.base_path))

    def apply(self, value: Any) -> str:
        return str(path_inside(Path(self.base_path), _file_name(value)))

    def plan(self, value: Any) -> PlannedFile:
        base = self.base_path if isinstance(self.base_path, Path) else Path()
        return PlannedFile(base, _file_name(value))


def _file_name(value: Any) -> str:
    if not isinstance(value, str | Path):
        raise UserError(f"{value!r} is not a file name; write a path relative to the data set folder.")
    return str(value)


@dataclass(frozen=True)
class ForEach(Operator):
    """Every element of a list through an operator."""

    operator: Operator

    def __call__(self, value: Any, draw: Draw | None = None) -> list[Any]:
        return [self.operator(element, draw) for element in value]

    def apply(self, value: Any) -> list[Any]:
        return self(value)

    def plan(self, value: Any) -> list[Any]:
        return [self.operator.plan(element) for element in value]

    def children(self) -> Sequence[Operator]:
        return (self.operator,)


class _Route(Operator):
    routes: tuple[tuple[Any, Operator], ...]

    def _choose(self, value: Any) -> Operator:
        raise NotImplementedError

    def __call__(self, value: Any, draw: Draw | None = None) -> Any:
        return self._choose(value)(value, draw)

    def apply(self, value: Any) -> Any:
        return self(value)

    def plan(self, value: Any) -> Any:
        return self._choose(value).plan(value)

    def children(self) -> Sequence[Operator]:
        return tuple(operator for _, operator in self.routes)


@dataclass(frozen=True)
class RouteByType(_Route):
    """The operator whose type the value has.

    Args:
        routes: ``(type, operator)`` pairs, the first that fits is taken.
    """

    routes: tuple[tuple[type | tuple[type, ...], Operator], ...]

    def __init__(self, routes: Iterable[tuple[type | tuple[type, ...], Operator | Callable[[Any], Any]]]) -> None:
        object.__setattr__(self, "routes", tuple((kind, as_operator(operator)) for kind, operator in routes))

    def _choose(self, value: Any) -> Operator:
        kind = type(value)
        if isinstance(value, PlannedFile):
            kind = Image.Image if value.is_loaded else str
        for accepted, operator in self.routes:
            if issubclass(kind, accepted):
                return operator
        raise UserError(f"{value!r} is of type {kind.__name__}, for which there is no operator.")


@dataclass(frozen=True)
class RouteByExtension(_Route):
    """The operator for the extension of a file name.

    Args:
        routes: ``(extensions, operator)`` pairs, extensions with or without dot in any case, e.g. ``("jpg", "png")``.
    """

    routes: tuple[tuple[tuple[str, ...], Operator], ...]

    def __init__(self, routes: Iterable[tuple[str | Sequence[str], Operator | Callable[[Any], Any]]]) -> None:
        normalised = []
        for extensions, operator in routes:
            listed = (extensions,) if isinstance(extensions, str) else extensions
            normalised.append((tuple("." + e.lower().lstrip(".") for e in listed), as_operator(operator)))
        object.__setattr__(self, "routes", tuple(normalised))

    def _choose(self, value: Any) -> Operator:
        name = value.name if isinstance(value, PlannedFile) else _file_name(value)
        suffix = Path(name).suffix.lower()
        for extensions, operator in self.routes:
            if suffix in extensions:
                return operator
        known = ", ".join(e for extensions, _ in self.routes for e in extensions)
        raise UserError(f"{name} ends in {suffix!r}; files ending in {known} are read.")


def bind_base_path(operator: Operator, base_path: Path, is_first: bool = True) -> Operator:
    """The operator with ``base_path`` wherever a path is made absolute, or opened as it stands in the metadata.

    Args:
        is_first: Whether the operator gets the values of the metadata, unchanged.
    """
    if isinstance(operator, ToAbsolutePath):
        return operator if operator.base_path else ToAbsolutePath(base_path)
    if operator.opens_path and is_first:
        return chain(ToAbsolutePath(base_path), operator)
    if isinstance(operator, Chain):
        steps = []
        for step in operator.steps:
            steps.append(bind_base_path(step, base_path, is_first))
            is_first = is_first and isinstance(step, _Light)
        return chain(*steps)
    if isinstance(operator, ForEach):
        return ForEach(bind_base_path(operator.operator, base_path, is_first))
    if isinstance(operator, RouteByType | RouteByExtension):
        bound: list[Any] = [(key, bind_base_path(branch, base_path, is_first)) for key, branch in operator.routes]
        return type(operator)(bound)
    return operator


def random_parts(operator: Operator) -> list[RandomOperator]:
    """The random operators in an operator, without those that were set to be deterministic."""
    own = [operator] if isinstance(operator, RandomOperator) and operator.variants() else []
    return own + [part for child in operator.children() for part in random_parts(child)]
