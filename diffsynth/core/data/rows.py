"""The rows of a data set as its metadata has them: columns, captions, and the files that each column names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, did_you_mean
from .metadata import Table, TextColumn
from .operators import Operator, PlannedFile, as_operator, bind_base_path

CAPTION_COLUMN = "prompt"
_ALIASES = {"file_name": "image", "text": CAPTION_COLUMN}


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on, and why."""

    row: int
    """Number of the row in the metadata, from 1, the header not counted."""
    column: str
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}, column {self.column!r}: {self.reason}"


class BadRowError(UserError):
    """A row of a data set cannot be used.

    Args:
        message: Names metadata, row and column.
        bad_row: The same in parts; None in an error that a worker process sent as text.
    """

    def __init__(self, message: str, bad_row: BadRow | None = None) -> None:
        super().__init__(message)
        self.bad_row = bad_row


class DataRows:
    """Rows by number, from 0, and what their columns name.

    Args:
        table: What the metadata reader found. Columns ``file_name`` and ``text`` are renamed.
        base_path: Folder that file names are relative to.
        data_file_keys: Columns that name files.
        operators: Column -> operator applied to it.
    Raises:
        UserError: a column of ``data_file_keys`` is missing.
    """

    def __init__(
        self, table: Table, base_path: Path, data_file_keys: tuple[str, ...],
        operators: Mapping[str, Operator | Callable[[Any], Any]],
    ) -> None:
        self.table, self.base_path, self.data_file_keys = table, base_path, data_file_keys
        self._file_prefix = _prefix(table.folder, base_path)
        self._rename_columns({*data_file_keys, *operators})
        self._require_file_columns()
        self.file_columns = {*data_file_keys, "image", "video"}
        self.operators = {
            key: bind_base_path(as_operator(function), base_path)
            for key, function in operators.items()
            if key in table.columns
        }
        self.present_keys = [key for key in data_file_keys if key in self.operators]
        """Those of ``data_file_keys`` that the metadata has."""

    def __len__(self) -> int:
        return self.table.num_rows

    def row(self, number: int) -> dict[str, Any]:
        """The metadata of a row; file names are relative to ``base_path``."""
        row = self.table.row(number)
        for key in self.file_columns & row.keys():
            row[key] = self.prefixed(row[key])
        return row

    def place(self, number: int, key: str) -> str:
        """How messages call one value."""
        return f"{self.table.source}, row {number + 1}, column {key!r}"

    @contextmanager
    def naming(self, number: int, key: str) -> Iterator[None]:
        """Say, in every ``UserError`` of this block, which value it is about."""
        try:
            yield
        except UserError as error:
            raise self.bad_row_error(number, key, str(error)) from error

    def bad_row_error(self, number: int, key: str, reason: str) -> BadRowError:
        return BadRowError(f"{self.place(number, key)}: {reason}", BadRow(number + 1, key, reason))

    def num_captions(self, number: int) -> int:
        """How many captions a row has: 1, or the length of its list."""
        column = self.table.columns.get(CAPTION_COLUMN)
        if column is None or isinstance(column, TextColumn) or CAPTION_COLUMN in self.operators:
            return 1
        value = column[number]
        return max(1, len(value)) if isinstance(value, list) else 1

    def choose_caption(self, row: dict[str, Any], number: int, choice: int) -> None:
        """Put one caption in the place of a list of them."""
        captions = row.get(CAPTION_COLUMN)
        if not isinstance(captions, list) or CAPTION_COLUMN in self.operators:
            return
        if problem := caption_problem(captions):
            raise self.bad_row_error(number, CAPTION_COLUMN, problem)
        row[CAPTION_COLUMN] = captions[choice]

    def require_usable(self, number: int, row: Mapping[str, Any]) -> None:
        """Refuse a row that the metadata reader found wanting, or that names no file."""
        if number in self.table.problems:
            key, problem = self.table.problems[number]
            raise self.bad_row_error(number, key, problem)
        with self.naming(number, ", ".join(self.data_file_keys)):
            self.require_file_key(row)

    def require_file_key(self, row: Mapping[str, Any]) -> None:
        # a row of json metadata may lack some of the columns, but names at least one file
        if self.data_file_keys and row.keys().isdisjoint(self.data_file_keys):
            raise UserError(f"the row has none of the columns {', '.join(self.data_file_keys)}; name a file.")

    def leaves(self, key: str, value: Any) -> list[Any]:
        """What the column's operator will read, as far as can be told without opening a file."""
        leaves = _flatten(self.operators[key].plan(value))
        if key not in self.data_file_keys:
            return leaves
        # an operator that cannot be planned, but the column is known to name files
        return [PlannedFile(self.base_path, leaf) if isinstance(leaf, str) else leaf for leaf in leaves]

    def prefixed(self, value: Any) -> Any:
        """A file name, or a list of them, relative to ``base_path``."""
        if not self._file_prefix:
            return value
        if isinstance(value, list):
            return [self.prefixed(element) for element in value]
        return self._file_prefix + value if isinstance(value, str) and value else value

    def require_columns(self, *names: str) -> None:
        """Make sure that the metadata has these columns.

        Raises:
            UserError: one is missing; says which there are.
        """
        found = list(self.table.columns)
        for name in names:
            if name not in found:
                raise UserError(
                    f"{self.table.source} has no column {name!r}; it has {', '.join(found)}."
                    f"{did_you_mean(name, found)}"
                )

    def _rename_columns(self, asked: set[str]) -> None:
        main = self.data_file_keys[0] if len(self.data_file_keys) == 1 else "image"
        for old, new in {**_ALIASES, "file_name": main}.items():
            columns = self.table.columns
            if old in columns and new not in columns and old not in asked:
                self.table.columns = {new if name == old else name: column for name, column in columns.items()}

    def _require_file_columns(self) -> None:
        missing = [key for key in self.data_file_keys if key not in self.table.columns]
        interchangeable = {"image", "video"}
        present = interchangeable & set(self.data_file_keys) - set(missing)
        if not (present and set(missing) <= interchangeable):
            self.require_columns(*missing)


def caption_problem(value: Any) -> str | None:
    """What is wrong with a caption, or a list of captions."""
    captions: Sequence[Any] = value if isinstance(value, list) else [value]
    if captions and all(isinstance(caption, str) for caption in captions):
        return None
    return f"holds {value!r}; write one caption as text, or a list of captions."


def _prefix(folder: Path | None, base: Path) -> str:
    """What turns file names relative to ``folder`` into names relative to ``base``."""
    if folder is None or not folder.is_relative_to(base) or folder == base:
        return ""
    return folder.relative_to(base).as_posix() + "/"


def _flatten(value: Any) -> list[Any]:
    if type(value) in (list, tuple):  # a PlannedFile is a leaf
        return [leaf for element in value for leaf in _flatten(element)]
    return [value]
