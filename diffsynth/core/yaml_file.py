"""Files of ``name: value`` lines: plain YAML, nothing that refers, computes or stands for something else."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from .errors import UserError

MAX_BYTES = 2**18
"""A configuration is a page or two; what is larger is some other file, and a reader in Python takes 20 s for 1 MB."""
MAX_DEPTH = 20
_STANDARD = "tag:yaml.org,2002:"
_PLAIN_VALUES = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", list("-+.0123456789")),
)
"""Kind, its pattern, and how it may begin; everything else is text."""


def read_yaml_file(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The values of a YAML file by name, and the line that each stands on.

    Texts, numbers, true/false, null, lists and mappings are read as YAML 1.2 does: ``no`` and ``12:30`` are texts,
    and ``1e-5`` is a number.

    Raises:
        UserError: the file is missing, too large, not text, not YAML, or more than plain YAML: anchors, aliases,
            tags, several documents, a name that stands there twice.
    """
    import yaml

    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the configuration file {path}: {getattr(error, 'strerror', None) or error}."
                        ) from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES // 2**10} KB; that is no configuration file.")
    try:
        text = content.decode("utf-8-sig")
        _refuse_references(path, text)
        document = yaml.compose(text, Loader=_plain_loader())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        mark = getattr(error, "problem_mark", None)
        raise _not_plain(path, mark.line if mark else None, reason) from None
    if document is None or document.value == "":
        return {}, {}
    if not isinstance(document, yaml.MappingNode):
        kind = "list" if isinstance(document, yaml.SequenceNode) else "text"
        raise UserError(f"{path}: expected one 'name: value' per line, found a {kind}.")
    lines = {str(key.value): key.start_mark.line + 1 for key, _ in document.value}
    return _value(path, document), lines


def yaml_text(values: Mapping[str, Any]) -> str:
    """``name: value`` lines that ``read_yaml_file``, and any other reader of YAML, gives back as they are."""
    import yaml

    return yaml.dump(values, Dumper=_plain_dumper(), sort_keys=False, allow_unicode=True, default_flow_style=False)


def _not_plain(path: Path, line: int | None, reason: str) -> UserError:
    place = "" if line is None else f", line {line + 1}"
    return UserError(f"{path}{place}: not plain YAML ({reason}); write one 'name: value' per line.")


def _refuse_references(path: Path, text: str) -> None:
    """Look at the events alone, before anything is built of them: aliases can make much out of a few bytes."""
    import yaml

    depth = 0
    event: Any
    for event in yaml.parse(text, Loader=_plain_loader()):
        line = event.start_mark.line
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _not_plain(path, line, "anchors (&name) and aliases (*name) are not read; put a text that begins so "
                                         "in quotes")
        if getattr(event, "tag", None) is not None:
            raise _not_plain(path, line, f"the tag {event.tag} is not read")
        if isinstance(event, yaml.DocumentStartEvent) and event.version is not None:
            raise _not_plain(path, line, "a %YAML directive is not read")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _not_plain(path, line, f"more than {MAX_DEPTH} lists inside each other")


@cache
def _plain_loader() -> Any:
    """PyYAML's safe loader with the plain values of YAML 1.2 instead of those of 1.1."""
    import yaml

    class PlainLoader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}  # type: ignore[misc]

    _add_plain_values(PlainLoader)
    return PlainLoader


@cache
def _plain_dumper() -> Any:
    import yaml

    class PlainDumper(yaml.SafeDumper):
        """Puts in quotes what either version of YAML takes for more than text."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    _add_plain_values(PlainDumper)
    return PlainDumper


def _add_plain_values(reader_or_writer: Any) -> None:
    for kind, pattern, first in _PLAIN_VALUES:
        reader_or_writer.add_implicit_resolver(_STANDARD + kind, re.compile(rf"^(?:{pattern})$"), first)


def _value(path: Path, node: Any) -> Any:
    import yaml

    if isinstance(node, yaml.SequenceNode):
        return [_value(path, part) for part in node.value]
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _not_plain(path, key.start_mark.line, "a name is a single word")
            if key.value in found:
                raise UserError(f"{path}, line {key.start_mark.line + 1}: {key.value!r} stands there twice; "
                                "leave one of them out.")
            found[key.value] = _value(path, value)
        return found
    kind, text = node.tag.removeprefix(_STANDARD), node.value
    if "\0" in text:
        raise _not_plain(path, node.start_mark.line, "a NUL byte, which no name or text has")
    read: dict[str, Callable[[str], Any]] = {
        "null": lambda _: None, "bool": lambda word: word.lower() == "true", "int": int, "float": float}
    try:
        return read.get(kind, str)(text)
    except ValueError:
        raise _not_plain(path, node.start_mark.line, f"a number of {len(text)} digits") from None
