"""Metadata readers: csv, json, jsonl, the ``train/`` layout, and plain folders of pictures with ``.txt`` captions.

A table is kept column-wise and text columns as one UTF-8 blob with offsets: a row costs its own bytes and eight more,
pickling for a spawned worker is a memory copy, and forked workers do not duplicate it by touching reference counts.
"""

from __future__ import annotations

import csv
import json
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .files import path_inside

METADATA_SUFFIXES = (".csv", ".jsonl", ".json")
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
MAX_TEXT = 131_072
"""Characters of one cell, as the csv module has it; text encoders read some hundred words."""
MAX_COLUMNS = 1000
MAX_DEPTH = 8
"""Lists and objects inside each other."""
_ROWS_AT_ONCE = 256  # fewer lists than the garbage collector's threshold: 2048 takes twice the time


class Absent:
    """Stands in a json column for a row that lacks the key."""

    def __reduce__(self) -> str:
        return "ABSENT"  # stays one object through pickling


ABSENT = Absent()


class TextColumn(Sequence[str]):
    """Strings of one column, stored as one UTF-8 blob and the end of each."""

    def __init__(self, blob: bytes, ends: np.ndarray) -> None:
        self._blob = blob
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._ends[index - 1]) if index else 0
        return self._blob[start : int(self._ends[index])].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self._ends.tolist():
            yield self._blob[start:end].decode("utf-8", "surrogatepass")
            start = end


class _TextBuilder:
    def __init__(self) -> None:
        self._blobs: list[bytes] = []
        self._lengths: list[np.ndarray] = []

    def extend(self, values: Sequence[str]) -> bytes:
        """Append the values; returns their bytes, joined."""
        joined = "".join(values)
        if joined.isascii():
            blob, sizes = joined.encode("ascii"), map(len, values)
        else:
            encoded = [value.encode("utf-8", "surrogatepass") for value in values]
            blob, sizes = b"".join(encoded), map(len, encoded)
        self._blobs.append(blob)
        self._lengths.append(np.fromiter(sizes, np.int64, len(values)))
        return blob

    def build(self) -> TextColumn:
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int64)
        return TextColumn(b"".join(self._blobs), np.cumsum(lengths))


@dataclass
class Table:
    """Rows of a data set, column by column."""

    source: Path
    """What error messages call the table: the metadata file, or the folder of pictures."""
    columns: dict[str, Sequence[Any]] = field(default_factory=dict)
    num_rows: int = 0
    folder: Path | None = None
    """The folder that file names are relative to when the reader found the metadata by itself."""
    problems: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Row, from 0 -> the column that cannot be used, and why; the row lacks that column."""

    def row(self, index: int) -> dict[str, Any]:
        values = ((name, column[index]) for name, column in self.columns.items())
        return {name: value for name, value in values if value is not ABSENT}


def read_metadata(base_path: Path | None, metadata_path: Path | None) -> Table:
    """Read the table of a data set.

    Args:
        base_path: Folder of the data set.
        metadata_path: The metadata file. When not given, it is looked for in ``base_path`` (``metadata.csv``,
            ``.jsonl``, ``.json``), then in ``base_path/train`` (the older layout); when there is none, the folder is
            read as pictures with a ``.txt`` caption each.
    Raises:
        UserError: nothing to read there, or the metadata is malformed or holds no row.
    """
    if metadata_path is None:
        if base_path is None:
            raise UserError("The data set has neither a base_path nor a metadata_path; give at least one of them.")
        table = _find_in_folder(base_path)
    elif metadata_path.is_dir():
        table = _find_in_folder(metadata_path)
    else:
        table = _read_file(metadata_path)
    if table.num_rows == 0:
        raise UserError(f"{table.source} has no rows, so there is nothing to train on; add at least one.")
    return table


def _find_in_folder(folder: Path) -> Table:
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UserError(f"The data set folder {folder} {kind}; give the folder that holds the pictures.")
    for place in (folder, folder / "train"):
        for suffix in METADATA_SUFFIXES:
            file = place / f"metadata{suffix}"
            if file.is_file():
                path_inside(folder, str(file.relative_to(folder)))  # not a link to something else of the user's
                table = _read_file(file)
                table.folder = place
                return table
    return _read_captioned_folder(folder)


def _read_file(path: Path) -> Table:
    readers: dict[str, Callable[[Path], Table]] = {".csv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"The metadata file {path} ends in {path.suffix!r}; csv, json and jsonl are read.")
    if not path.is_file():
        near = [str(p) for p in sorted(path.parent.glob("*")) if p.suffix.lower() in readers][:3]
        hint = f"in that folder are: {', '.join(near)}" if near else "check dataset_metadata_path"
        raise UserError(f"The metadata file {path} does not exist; {hint}.")
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8.") from error
    except UserError:
        raise
    except (OSError, ValueError) as error:  # a NUL byte in its name is a ValueError
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def _read_csv(path: Path) -> Table:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, None)
            if not header:
                raise UserError(f"{path} is empty; its first line must name the columns, for example image,prompt.")
            names = _column_names(path, header)
            builders = [_TextBuilder() for _ in names]
            num_rows = 0
            while rows := list(islice(reader, _ROWS_AT_ONCE)):
                if set(map(len, rows)) != {len(names)}:
                    rows = _without_blank_lines(path, rows, names, num_rows)
                for builder, values in zip(builders, zip(*rows, strict=True), strict=False):  # no values: only blanks
                    if b"\0" in builder.extend(values):
                        bad = next(i for i, value in enumerate(values) if "\0" in value)
                        raise UserError(f"{path}, row {num_rows + bad + 1}: holds a NUL byte; the file is damaged.")
                num_rows += len(rows)
        except csv.Error as error:
            raise UserError(
                f"{path}, line {reader.line_num}: {error}; a field with commas, quotes or line breaks must be "
                'enclosed in double quotes, quotes inside it doubled ("").'
            ) from error
    columns = {name: builder.build() for name, builder in zip(names, builders, strict=True) if name}
    return Table(path, dict(columns), num_rows)


def _column_names(path: Path, header: Sequence[str]) -> list[str]:
    names = [name.strip() for name in header]
    if len(names) > MAX_COLUMNS:
        raise UserError(f"{path}: has {len(names)} columns, and no data set needs more than {MAX_COLUMNS}.")
    for position, name in enumerate(names):
        # an unnamed first column is the index that pandas writes; it is left out of the table
        if not name and position:
            raise UserError(f"{path}: column {position + 1} of {len(names)} has no name; name it or remove it.")
        if "\0" in name:
            raise UserError(f"{path}: the header holds a NUL byte; the file is damaged or not UTF-8.")
        if name in names[:position]:
            raise UserError(f"{path}: the column {name!r} is there twice; rename one of them.")
    return names


def _without_blank_lines(path: Path, rows: list[list[str]], names: Sequence[str], before: int) -> list[list[str]]:
    kept = [row for row in rows if row]
    for number, row in enumerate(kept, start=before + 1):
        if len(row) != len(names):
            raise UserError(
                f"{path}, row {number}: has {len(row)} fields where the header has {len(names)} "
                f"({', '.join(names)}); enclose fields that hold a comma in double quotes."
            )
    return kept


def _read_jsonl(path: Path) -> Table:
    with path.open(encoding="utf-8-sig") as file:
        lines = ((number, line) for number, line in enumerate(file, start=1) if not line.isspace())
        return _from_objects(path, (_parse_json(path, line, f", line {number}") for number, line in lines))


def _read_json(path: Path) -> Table:
    objects = _parse_json(path, path.read_text(encoding="utf-8-sig"), "")
    if not isinstance(objects, list):
        raise UserError(f"{path} holds {_json_kind(objects)}; metadata must be a list of objects, one for each sample.")
    return _from_objects(path, objects)


def _parse_json(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}{where}: not valid JSON ({error}).") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{name[:60]!r} stands in one object twice")
    return found


def _from_objects(path: Path, objects: Iterable[Any]) -> Table:
    columns: dict[str, list[Any]] = {}
    num_rows = 0
    for row in objects:
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {num_rows + 1}: is {_json_kind(row)}; every row must be an object.")
        for name, value in row.items():
            if problem := _cell_problem(name) or _cell_problem(value):
                raise UserError(f"{path}, row {num_rows + 1}, {name[:60]!r}: {problem}")
            column = columns.setdefault(name, [])
            column.extend([ABSENT] * (num_rows - len(column)))
            column.append(value)
        num_rows += 1
        if len(columns) > MAX_COLUMNS:
            raise UserError(f"{path}, row {num_rows}: the rows have more than {MAX_COLUMNS} different names; every row "
                            "should have the same few.")
    for column in columns.values():
        column.extend([ABSENT] * (num_rows - len(column)))
    return Table(path, {name: _compact(column) for name, column in columns.items()}, num_rows)


def _cell_problem(value: Any, depth: int = 0) -> str | None:
    """Why a value of JSON cannot be used: text that is no text, or lists in lists without end."""
    if type(value) is str:
        if len(value) > MAX_TEXT:
            return f"a text of {len(value)} characters, and at most {MAX_TEXT} are read."
        if not value.isascii() and _LONE_SURROGATE.search(value):
            return "holds half a character (a lone surrogate), which is no text; write it anew."
        return "holds a NUL byte; the file is damaged." if "\0" in value else None
    if not isinstance(value, list | dict):
        return None
    if depth == MAX_DEPTH:
        return f"has more than {MAX_DEPTH} lists or objects inside each other."
    parts = value if isinstance(value, list) else (part for item in value.items() for part in item)
    return next((problem for part in parts if (problem := _cell_problem(part, depth + 1))), None)


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _compact(values: list[Any]) -> Sequence[Any]:
    if not all(type(value) is str for value in values):
        return values
    builder = _TextBuilder()
    builder.extend(values)
    return builder.build()


def _json_kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _read_captioned_folder(folder: Path) -> Table:
    files = [file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES and file.is_file()]
    names = sorted(file.relative_to(folder).as_posix() for file in files)
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    if not names:
        raise UserError(
            f"{folder} holds neither metadata (metadata.csv, .jsonl or .json, there or in train/) nor pictures."
        )
    captions: list[Any] = []
    problems: dict[int, tuple[str, str]] = {}
    for number, name in enumerate(names):
        try:
            captions.append(_read_caption(folder, name))
        except UserError as error:
            captions.append(ABSENT)
            problems[number] = ("prompt", str(error))
    return Table(folder, {"image": _compact(names), "prompt": _compact(captions)}, len(names), folder, problems)


def _read_caption(folder: Path, name: str) -> str:
    caption = (folder / name).with_suffix(".txt")
    try:
        # a link may not make the content of another of the user's files a caption
        status = path_inside(folder, str(caption.relative_to(folder))).stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > 4 * MAX_TEXT:
            raise UserError(f"{caption} is no caption of at most {MAX_TEXT} characters; shorten or replace it.")
        text = caption.read_text(encoding="utf-8-sig").strip()
        if problem := _cell_problem(text):
            raise UserError(f"{caption}: {problem}")
        return text
    except FileNotFoundError as error:
        raise UserError(f"{folder / name} has no caption: write {caption.name} beside it, or add a metadata.csv."
                        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{caption} is not UTF-8 text ({error.reason}); save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{caption} cannot be read: {error.strerror}.") from error
