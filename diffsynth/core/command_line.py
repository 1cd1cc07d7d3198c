"""A command line from a set of options: tyro reads the words and writes the help, the schema checks the values."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args, get_origin

from pydantic.fields import FieldInfo

from .errors import RunStopped, StoppedEarly, UserError, did_you_mean, one_line

if TYPE_CHECKING:
    from .options import Options

NOT_GIVEN = ("\0",)
CONFIG_OPTION, PRINT_OPTION = "config", "print_config"
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def run_front_door(command: Callable[[], object]) -> NoReturn:
    """Run a command and leave the process.

    Exit codes: 0 done; 2 what the user got wrong; 3 a run that cannot go on; 4 a run that ended on request with its
    state saved; 130 Ctrl-C. All but the first come with one line on stderr.
    """
    try:
        command()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        sys.stderr.write(f"{'' if rank == '0' else f'[process {rank}] '}error: {one_line(error)}\n")
        sys.exit(2)
    except RunStopped as error:
        sys.stderr.write(f"stopped: {one_line(error)}\n")
        sys.exit(3)
    except StoppedEarly as error:
        sys.stderr.write(f"{one_line(error)}\n")
        sys.exit(4)
    except BrokenPipeError:
        # the reader of our output has left, as in ``diffsynth train --help | head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    sys.exit(0)


def read_command_line(
    options: type[Options], words: Sequence[str], prog: str | None = None, example: str = ""
) -> dict[str, Any]:
    """The options that the words name, as text still to be checked by the schema.

    Args:
        options: Schema that the words are read by.
        words: Command line without the program's name. ``--help`` prints the help and leaves the process.
        prog: How the program is called in the help.
        example: Lines shown under the help.
    Returns:
        Values by field name. Where the schema takes a configuration file, ``config`` holds its path and
        ``print_config`` whether the result is to be printed.
    Raises:
        UserError: an unknown option, a missing value, or more than one.
    """
    import tyro

    spellings = _spellings(options)
    wants_help = any(word in ("-h", "--help") for word in words)
    if not wants_help:
        _check_words(words, options, spellings)
    parsed: Any
    try:
        parsed, extra = tyro.cli(
            _raw_class(options), prog=prog, description=options.__doc__, args=_plain_flags(words, options, spellings),
            return_unknown_args=True, use_underscores=True,
        )
    except SystemExit:
        if wants_help and example:
            sys.stdout.write(f"\nexample:\n{example.rstrip()}\n")
        raise
    if extra:
        raise UserError(f"unexpected word {extra[0]!r} on the command line; a value follows its option, and one that "
                        f"contains spaces is put in quotes.")
    values = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(parsed)}
    flat = {name: given for group in values.values() for name, given in vars(group).items()}
    return {name: _value(options, name, given) for name, given in flat.items() if given not in (NOT_GIVEN, ())}


def option_name(name: str, field: FieldInfo) -> str:
    """The field's spelling on the command line, without dashes."""
    return _extra(field).get("option", name)


def is_positional(field: FieldInfo) -> bool:
    return bool(_extra(field).get("positional"))


def _extra(field: FieldInfo) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _spellings(options: type[Options]) -> dict[str, str]:
    """Option names as typed, without dashes -> field names."""
    names = {option_name(name, field): name for name, field in options.model_fields.items() if not is_positional(field)}
    return names | ({name: name for name in (CONFIG_OPTION, PRINT_OPTION)} if options.takes_config else {})


def _split_option(word: str) -> tuple[str, str, str]:
    name, equals, value = word.removeprefix("--").partition("=")
    return name.replace("-", "_"), equals, value


def _check_words(words: Sequence[str], options: type[Options], spellings: dict[str, str]) -> None:
    """Say in one sentence what tyro would say in a box: an unknown option, or one without its value."""
    flags = _flags(options, spellings)
    for word, following in zip(words, [*words, None][1:], strict=True):
        name, equals, _ = _split_option(word)
        if not word.startswith("--"):
            continue
        if name not in spellings and name.removeprefix("no_") not in flags:
            written = word.partition("=")[0]
            known = [f"--{spelling}" for spelling in spellings]
            if name.startswith("no"):
                known += [f"--no_{flag}" for flag in flags]
            suggestion = did_you_mean(written, known).replace("'", "")
            raise UserError(f"unknown option {written}.{suggestion or ' --help lists all options.'}")
        if not equals and name in spellings and name not in flags and (following is None or _is_option(following)):
            raise UserError(f"option {word} needs a value; one that begins with a dash is written {word}='...'.")


def _is_option(word: str) -> bool:
    return word.startswith("-") and not word[1:2].isdigit() and word[1:2] != "."


def _flags(options: type[Options], spellings: dict[str, str]) -> set[str]:
    return {spelling for spelling, name in spellings.items() if name == PRINT_OPTION or (
        name in options.model_fields and options.model_fields[name].annotation is bool)}


def _plain_flags(words: Sequence[str], options: type[Options], spellings: dict[str, str]) -> list[str]:
    """``--flag``, ``--no-flag`` and ``--flag true`` all become ``--flag=...``, so that no flag takes the next word."""
    flags = _flags(options, spellings)
    switched_on = {f"--{name}=true" for name in flags}
    plain: list[str] = []
    for word in words:
        name, equals, _ = _split_option(word)
        negated = name.startswith("no_") and name not in spellings and name.removeprefix("no_") in flags
        if word.startswith("--") and not equals and (name in flags or negated):
            plain.append(f"--{name.removeprefix('no_')}=false" if negated else f"--{name}=true")
        elif word.lower() in (*_TRUE, *_FALSE) and plain and plain[-1] in switched_on:
            plain[-1] = plain[-1].replace("=true", f"={word}")
        else:
            plain.append(word)
    return plain


def _value(options: type[Options], name: str, given: tuple[str, ...]) -> Any:
    field = options.model_fields.get(name)
    if field is None and name == PRINT_OPTION:
        if given[0].lower() not in (*_TRUE, *_FALSE):
            raise UserError(f"--{PRINT_OPTION}: {given[0]!r} is not true or false.")
        return given[0].lower() in _TRUE
    if field is not None and _is_list(field):
        return given[0] if len(given) == 1 and not is_positional(field) else given
    if field is not None and given[0].lower() == "none" and type(None) in _kinds(field):
        return None
    return given[0]


def _raw_class(options: type[Options]) -> type:
    """A dataclass in which each option holds its words, one nested class per help group: what tyro reads."""
    import tyro

    groups: list[tuple[str, Any, Any]] = []
    if options.takes_config:
        config = Annotated[tuple[str], tyro.conf.arg(
            help="Options, as name: value; the command line wins.", metavar="PATH", help_behavior_hint="(default: none)"
        )]
        prints = Annotated[tuple[str], tyro.conf.arg(
            help="Print every option, with where its value comes from, and stop.", metavar="",
            help_behavior_hint="(default: false)",
        )]
        groups.append(_group("Configuration file", "Options in a YAML file.", [
            (CONFIG_OPTION, config, _default()), (PRINT_OPTION, prints, _default())]))
    # where words without an option's name are read too, a list is one word, with commas: the next may be such a word
    has_positional = any(is_positional(field) for field in options.model_fields.values())
    for title, description, names in options.groups():
        fields = []
        for name in names:
            field = options.model_fields[name]
            argument = tyro.conf.arg(
                name=option_name(name, field), metavar=_metavar(field), help=field.description or "",
                help_behavior_hint="(required)" if _is_required(field) else f"(default: {_default_text(field)})",
            )
            is_open = _is_list(field) and (is_positional(field) or not has_positional)
            words: Any = tuple[str, ...] if is_open else tuple[str]
            if is_positional(field):
                words = tyro.conf.Positional[words]  # type: ignore[misc]
            fields.append((name, Annotated[words, argument], _default()))
        groups.append(_group(title, description, fields))
    return dataclasses.make_dataclass("CommandLine", groups)


def _group(title: str, description: str, fields: list[Any]) -> tuple[str, Any, Any]:
    import tyro

    name = title.replace(" ", "_")
    group = dataclasses.make_dataclass(name, fields)
    group.__doc__ = description or title
    # the heading of a group is its name; as a prefix of its options the name is left out
    shown = tyro.conf.OmitArgPrefixes[Annotated[group, tyro.conf.arg(name=title)]]  # type: ignore[valid-type]
    return name, shown, dataclasses.field(default_factory=group)


def _is_required(field: FieldInfo) -> bool:
    return field.is_required()


def _default() -> Any:
    return dataclasses.field(default=NOT_GIVEN)


def _kinds(field: FieldInfo) -> list[Any]:
    from .options import union_members

    return union_members(field.annotation)


def _is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple and "JSON" not in field.metadata


def _metavar(field: FieldInfo | None) -> str:
    if field is None:
        return "PATH"
    if tags := [tag for tag in field.metadata if isinstance(tag, str)]:
        return tags[0]
    kinds = [kind for kind in _kinds(field) if kind is not type(None)]
    if get_origin(kinds[0]) is Literal:
        return "{" + ",".join(map(str, get_args(kinds[0]))) + "}"
    return {int: "INT", float: "FLOAT", bool: ""}.get(kinds[0], _extra(field).get("metavar", "TEXT"))


def _default_text(field: FieldInfo) -> str:
    default = field.default
    if default is None:
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or "none"
    return str(default) if default not in ("", {}) else "none"
