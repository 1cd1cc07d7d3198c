"""Options declared once: a frozen, checked schema that the command line, YAML files and Python all read.

A set of options is a class derived from ``Options``; its fields carry type, default and description. Help groups are
the classes it inherits from. Whatever the source of a value, pydantic checks it, and what is wrong comes out as one
sentence. ``diffsynth.core.command_line`` turns the same schema into a command line.
"""

from __future__ import annotations

import json
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, PrivateAttr, ValidationError, model_validator
from pydantic.fields import FieldInfo

from .command_line import CONFIG_OPTION, PRINT_OPTION, is_positional, option_name, read_command_line
from .errors import UserError, did_you_mean
from .yaml_file import read_yaml_file, yaml_text

DEFAULT = "default"
COMMAND_LINE = "command line"
PYTHON = "python"

OptionsT = TypeVar("OptionsT", bound="Options")


def _split(separator: str) -> Callable[[Any], Any]:
    def split(value: Any) -> Any:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list | tuple) or not all(isinstance(part, str) for part in values):
            return value
        return tuple(part.strip() for text in values for part in text.split(separator) if part.strip())

    return split


def _join_commas(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def _parse_paths(value: Any) -> Any:
    """Paths as JSON text (as the pages print them), as one bare path, or as the list itself."""
    if isinstance(value, Path):
        return (str(value),)
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith(("[", '"')):
        return (value,) if value.strip() else ()
    parsed = _parse_json(value)
    return (parsed,) if isinstance(parsed, str) else parsed


def _parse_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not valid JSON at character {error.pos} ({error.msg}); write it in single quotes, with no comma before "
            f"a closing bracket"
        ) from error
    except RecursionError as error:
        raise ValueError("lists or objects inside each other without end") from error


CommaList = Annotated[tuple[str, ...], BeforeValidator(_split(",")), "A,B,..."]
"""Names separated by commas, or a list."""
BarList = Annotated[tuple[str, ...], BeforeValidator(_split("|")), "TEXT|TEXT|..."]
"""Texts separated by ``|``, or a list."""
CommaText = Annotated[str, BeforeValidator(_join_commas), "A,B,..."]
"""Names separated by commas, kept as text because it may also be a regular expression."""
PathList = Annotated[tuple[str | tuple[str, ...], ...], BeforeValidator(_parse_paths), "JSON"]
"""A list of paths in JSON; a list inside the list is one model in several files."""
JsonObject = Annotated[dict[str, Any], BeforeValidator(_parse_json), "JSON"]
"""A JSON object, or a mapping."""


class OptionError(UserError):
    """Options that do not fit their schema."""

    def __init__(self, options: type[Options], error: ValidationError) -> None:
        self.options, self.error = options, error
        super().__init__(self.explain(str))

    def explain(self, place: Callable[[str], str]) -> str:
        """One line that names each wrong option, as ``place`` writes it, its value, and what it should be."""
        fields = self.options.model_fields
        sentences: dict[str, str] = {}
        for problem in self.error.errors():
            name = str(problem["loc"][0]) if problem["loc"] else ""
            if name in sentences:
                continue
            if problem["type"] == "extra_forbidden":
                sentences[name] = f"unknown option {place(name)!r}.{did_you_mean(name, fields)}"
            elif problem["type"] == "missing":
                sentences[name] = f"{place(name)} is required."
            elif problem["type"] == "value_error":
                reason = str(problem["ctx"]["error"]).rstrip(".")
                sentences[name] = f"{place(name)}: {reason}." if name else f"{reason}."
            else:
                sentences[name] = f"{place(name)}: {_short(problem['input'])} is not {describe_type(fields[name])}."
        return " ".join(sentences.values())


class Options(BaseModel):
    """Base of every set of options: frozen, keyword-only, refuses unknown names, says what is wrong in a sentence."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=True, allow_inf_nan=False)
    title: ClassVar[str] = "Options"
    """Heading of this group in the help."""
    takes_config: ClassVar[bool] = False
    """Whether the command line offers ``--config FILE`` and ``--print_config``."""
    repeat_with: ClassVar[str] = ""
    """Command that repeats what a saved configuration describes."""
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise OptionError(type(self), error) from None
        self._origins.update({name: PYTHON for name in values})

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.model_dump() == other.model_dump()

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def origins(self) -> dict[str, str]:
        """Where each value came from: ``default``, the name of a YAML file, ``command line`` or ``python``."""
        return {name: self._origins.get(name, DEFAULT) for _, _, names in type(self).groups() for name in names}

    @model_validator(mode="before")
    @classmethod
    def _no_numbers_from_booleans(cls, values: Any) -> Any:
        """True is not the number 1; where the choices are words, false is ``no`` or ``off``."""
        if not isinstance(values, Mapping):
            return values
        return {name: _word(cls.model_fields.get(name), value) for name, value in values.items()}

    @classmethod
    def groups(cls) -> list[tuple[str, str, list[str]]]:
        """Help groups: heading, description and field names, in the order of inheritance; equal headings are one."""
        found: dict[str, tuple[str, str, list[str]]] = {}
        inherited: set[str] = set()
        for base in cls.__bases__:
            if issubclass(base, Options):
                inherited |= set(base.model_fields)
                for title, description, names in base.groups():
                    found.setdefault(title, (title, description, []))[2].extend(names)
        if own := [name for name in cls.model_fields if name not in inherited]:
            found.setdefault(cls.title, (cls.title, cls.__doc__ or "", []))[2].extend(own)
        return list(found.values())

    @classmethod
    def from_sources(cls: type[OptionsT], yaml: Path | None = None, command_line: Sequence[str] = ()) -> OptionsT:
        """Read the options from a YAML file and a command line; the command line wins.

        Args:
            yaml: File with one ``name: value`` per line.
            command_line: Words after the command, for example ``["--lora_rank", "8"]``.
        Raises:
            UserError: an unknown name, a wrong type or value, or a file that is not plain YAML.
        """
        return cls._combine(yaml, read_command_line(cls, command_line))

    @classmethod
    def from_command_line(
        cls: type[OptionsT], words: Sequence[str] | None = None, prog: str | None = None, example: str = ""
    ) -> OptionsT:
        """What a front door calls: read the process's own command line, with ``--help`` and ``--config FILE``.

        ``--help`` and ``--print_config`` leave the process with what they print.

        Args:
            words: Command line without the program's name; None for that of this process.
            prog: How the program is called in the help.
            example: Lines shown under the help.
        """
        given = read_command_line(cls, sys.argv[1:] if words is None else words, prog, example)
        file = given.pop(CONFIG_OPTION, None) if cls.takes_config else None
        prints = given.pop(PRINT_OPTION, False) if cls.takes_config else False
        options = cls._combine(Path(file) if file is not None else None, given)
        if prints:
            sys.stdout.write(options.resolved_yaml())
            sys.exit(0)
        return options

    @classmethod
    def _combine(cls: type[OptionsT], yaml: Path | None, given: dict[str, Any]) -> OptionsT:
        written, lines = read_yaml(yaml, cls) if yaml else ({}, {})
        origins = {name: str(yaml) for name in written} | {name: COMMAND_LINE for name in given}

        def place(name: str) -> str:
            if origins.get(name, COMMAND_LINE) != COMMAND_LINE or name not in cls.model_fields:
                line = f", line {lines[name]}" if name in lines else ""
                return f"{origins.get(name, '')}{line}: {name}"
            field = cls.model_fields[name]
            return option_name(name, field).upper() if is_positional(field) else f"--{option_name(name, field)}"

        try:
            options = cls(**(written | given))
        except OptionError as error:
            raise UserError(error.explain(place)) from None
        named = {name: yaml.name for name in written} if yaml else {}
        options._origins.update(named | {name: COMMAND_LINE for name in given})
        return options

    def replace(self: OptionsT, **changes: Any) -> OptionsT:
        """A checked copy with some values changed; origins are kept."""
        given = {name: getattr(self, name) for name in self._origins} | changes
        copy = type(self)(**given)
        same = [name for name in self._origins if name not in changes or getattr(copy, name) == getattr(self, name)]
        copy._origins.update({name: self._origins[name] for name in same})
        return copy

    def resolved_yaml(self) -> str:
        """Every value as YAML, ordered by where it came from; reading it back gives equal options."""
        values = self.model_dump(mode="json")
        sections: dict[str, list[str]] = {}
        for name, origin in self.origins.items():
            sections.setdefault(origin, []).append(name)
        order = sorted(sections, key=lambda origin: (origin == DEFAULT, origin != COMMAND_LINE, origin))
        text = [f"# Every option of this run; repeat it with: {self.repeat_with}\n" if self.repeat_with else ""]
        for origin in order:
            chosen = {name: values[name] for name in sections[origin]}
            text.append(f"\n# from: {origin if origin.isprintable() else ascii(origin)}\n")
            text.append(yaml_text(chosen))
        return "".join(text)


def read_yaml(path: Path, options: type[Options]) -> tuple[dict[str, Any], dict[str, int]]:
    """Values by name, and the line of each, from a YAML file that has only known names.

    Raises:
        UserError: the file is missing, is not plain YAML, or has an unknown key.
    """
    values, lines = read_yaml_file(path)
    for name in values:
        if name not in options.model_fields:
            raise UserError(f"{path}, line {lines[name]}: unknown key {name!r}."
                            f"{did_you_mean(name, options.model_fields)}")
    return values, lines


_TAGS = {"JSON": "valid JSON of the expected form", "A,B,...": "names separated by commas",
         "TEXT|TEXT|...": "texts separated by |"}


def describe_type(field: FieldInfo) -> str:
    """What a field accepts, in words: ``a whole number, at least 1``."""
    kinds = [_kind_in_words(kind) for kind in union_members(field.annotation)]
    text = " or ".join(dict.fromkeys(kinds))
    if any(isinstance(tag, str) for tag in field.metadata):
        text = next(_TAGS.get(tag, f"a list {tag}")
                    for tag in field.metadata if isinstance(tag, str))
    bounds = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
    for tag in field.metadata:
        for attribute, words in bounds.items():
            if hasattr(tag, attribute):
                text += f", {words} {getattr(tag, attribute)}"
    return text


def union_members(annotation: Any) -> list[Any]:
    """The alternatives of a field's type; ``None`` among them means that the option may be left out."""
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for part in get_args(annotation) for member in union_members(part)]
    return [annotation]


def _kind_in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}.get(
        kind, "a valid value"
    )


def _word(field: FieldInfo | None, value: Any) -> Any:
    if field is None or not isinstance(value, bool):
        return value
    kinds = union_members(field.annotation)
    if bool not in kinds and (int in kinds or float in kinds):
        return str(value).lower()  # pydantic would take it for 1 or 0
    literals = [kind for kind in kinds if get_origin(kind) is Literal]
    choices = [word for kind in literals for word in get_args(kind)]
    return next((word for word in (("on", "yes") if value else ("no", "off")) if word in choices), value)


def _short(value: Any) -> str:
    text = reprlib.repr(value) if isinstance(value, list | tuple | dict) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
