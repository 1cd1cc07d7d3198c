"""The data set: rows of metadata, with operators applied to the columns that name files."""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import UserError, did_you_mean
from ..random import keyed_seed
from .describe import describe
from .files import FileHasher, find_problems
from .image_file import read_image, read_size
from .image_operators import default_image_operator, fixed_size
from .metadata import ABSENT, read_metadata
from .operators import Draw, Identity, Operator, PlannedFile, as_operator, bind_base_path, random_parts

_OPERATORS_VERSION = 1  # raised when an operator gives other pixels than before, so that old caches are not used
_ALIASES = {"file_name": "image", "text": "prompt"}


class UnifiedDataset(torch.utils.data.Dataset):
    """Samples of a data set: each row of its metadata, with the files that it names loaded.

    Args:
        base_path: Folder of the files; by default the folder of ``metadata_path``.
        metadata_path: csv, json or jsonl file, or a folder that holds ``metadata.*``, ``train/metadata.*``, or
            pictures with ``.txt`` captions; by default ``base_path``.
        repeat: How often each row comes in one epoch.
        data_file_keys: Columns that name files: a list, or names separated by commas. Of ``image`` and ``video`` one
            may be missing from the metadata when the other is there; any other missing column is an error.
        main_data_operator: Applied to those columns.
        special_operator_map: Column -> operator that takes precedence for that column, named above or not.
        seed: Of the random operators.

    Columns called ``file_name`` and ``text`` are read as ``image`` and ``prompt``. Samples are numbered 0 to
    ``num_rows * repeat - 1``; error messages count rows from 1, the header not included.
    """

    default_image_operator = staticmethod(default_image_operator)

    def __init__(
        self,
        base_path: str | Path | None = None,
        metadata_path: str | Path | None = None,
        repeat: int = 1,
        data_file_keys: str | Sequence[str] = (),
        main_data_operator: Operator | Callable[[Any], Any] = Identity(),  # noqa: B008  (immutable)
        special_operator_map: Mapping[str, Operator | Callable[[Any], Any]] | None = None,
        seed: int = 0,
    ) -> None:
        if repeat < 1:
            raise UserError(f"dataset_repeat must be at least 1, got {repeat}.")
        keys = data_file_keys.split(",") if isinstance(data_file_keys, str) else data_file_keys
        self.data_file_keys = tuple(key.strip() for key in keys if key.strip())
        self.repeat = repeat
        self.seed = seed
        base, metadata = _as_path(base_path), _as_path(metadata_path)
        self._table = read_metadata(base, metadata)
        self.metadata_path = self._table.source
        if base is None:
            base = metadata if metadata is not None and metadata.is_dir() else self._table.source.parent
        self.base_path = base
        self._file_prefix = _prefix(self._table.folder, base)
        special = special_operator_map or {}
        self._rename_columns({*self.data_file_keys, *special})
        self._require_file_columns()
        self._file_columns = {*self.data_file_keys, "image", "video"}
        chosen = {**dict.fromkeys(self.data_file_keys, main_data_operator), **special}
        self._operators = {
            key: bind_base_path(as_operator(function), base)
            for key, function in chosen.items()
            if key in self._table.columns
        }
        self._radices = _radices(self._operators.values())
        self._fixed_bucket = next((fixed_size(self._operators[k]) for k in self._present_keys()), None)
        self._forget()

    def __len__(self) -> int:
        return self.num_rows * self.repeat

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """The sample of an item, or of an (item, variant)."""
        item, variant = index if isinstance(index, tuple) else (index, 0)
        return self.load(item, variant)

    @property
    def num_rows(self) -> int:
        return self._table.num_rows

    @property
    def num_variants(self) -> int:
        """How many different samples the random operators can make of one row."""
        return math.prod(self._radices.values())

    def row(self, item: int) -> dict[str, Any]:
        """The metadata of an item; file names are relative to ``base_path``."""
        row = self._table.row(self._row_number(item))
        for key in self._file_columns & row.keys():
            row[key] = self._prefixed(row[key])
        return row

    def variant(self, item: int, epoch: int) -> int:
        """Which variant of its row an item shows in this epoch; drawn uniformly, keyed by (seed, epoch, item)."""
        return keyed_seed(self.seed, epoch, operator.index(item), "augmentation") % self.num_variants

    def load(self, item: int, variant: int = 0) -> dict[str, Any]:
        """The row with its operators applied; depends on (seed, row, variant) alone.

        Raises:
            UserError: a file is missing, damaged, too large or outside the folder; names metadata, row and column.
        """
        number, row = self._row_number(item), self.row(item)
        draw = self._draw(number, variant)
        with self._naming(number, ", ".join(self.data_file_keys)):
            self._require_file_key(row)
        for key, column_operator in self._operators.items():
            if key in row:
                with self._naming(number, key):
                    row[key] = column_operator(row[key], draw)
        return row

    def fingerprint(self, item: int, variant: int = 0) -> dict[str, str]:
        """What ``load`` would return, told by content and without decoding.

        Returns:
            For each column the text itself, or for columns with an operator a hash over the content of their files,
            the operator, and those of its random choices that change the outcome. Moved or renamed files keep theirs.
        """
        number, row = self._row_number(item), self.row(item)
        draw = self._draw(number, variant)
        prints: dict[str, str] = {}
        for key, value in row.items():
            column_operator = self._operators.get(key)
            if column_operator is None:
                prints[key] = _as_text(value)
                continue
            with self._naming(number, key):
                contents = [self._content(leaf) for leaf in self._leaves(key, value)]
                if key not in self._descriptions:
                    self._descriptions[key] = describe(column_operator)
            choices = sorted(draw.describe(part) for part in random_parts(column_operator))
            parts = [_OPERATORS_VERSION, isinstance(value, list), contents, self._descriptions[key], choices]
            prints[key] = hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()
        return prints

    def bucket(self, item: int) -> tuple[int, int] | None:
        """(height, width) of the first picture that the item's file columns will give.

        Read from the file's header at most once; None when the operators do not tell the size.
        """
        if self._fixed_bucket is not None:
            return self._fixed_bucket
        number = self._row_number(item)
        if number not in self._buckets:
            self._buckets[number] = self._read_bucket(item, number)
        return self._buckets[number]

    def buckets(self) -> list[tuple[int, int] | None]:
        """``bucket`` of every item."""
        if self._fixed_bucket is not None:
            return [self._fixed_bucket] * len(self)
        return [self.bucket(item) for item in range(self.num_rows)] * self.repeat

    def check(self, depth: Literal["files", "headers", "pixels"] = "files") -> None:
        """Make sure that every file named by the metadata can be used.

        Args:
            depth: ``files``: exists, is not empty, lies inside its folder (listing folders, not opening files);
                ``headers``: also is a picture of an acceptable size; ``pixels``: also decodes.
        Raises:
            UserError: names the first row with a problem, and says how many more there are.
        """
        problems: dict[tuple[int, str], str] = {}
        files = {key: self._planned_files(key, problems) for key in self._present_keys()}
        for key, planned in files.items():
            by_base: dict[Path, list[tuple[int, str]]] = {}
            for number, file in planned:
                by_base.setdefault(file.base or Path("/"), []).append((number, file.name))
            for base, named in by_base.items():
                for position, problem in find_problems(base, (name for _, name in named)):
                    problems.setdefault((named[position][0], key), problem)
        if depth != "files":
            for key, planned in files.items():
                self._check_pictures(key, planned, depth, problems)
        if problems:
            (number, key), problem = min(problems.items())
            more = f" ({len(problems) - 1} more rows have problems.)" if len(problems) > 1 else ""
            raise UserError(f"{self._place(number, key)}: {problem}{more}")

    def _check_pictures(
        self,
        key: str,
        planned: list[tuple[int, PlannedFile]],
        depth: Literal["headers", "pixels"],
        problems: dict[tuple[int, str], str],
    ) -> None:
        seen: dict[PlannedFile, str | None] = {}
        for number, file in planned:
            if not file.is_loaded or (number, key) in problems:
                continue
            if file not in seen:
                seen[file] = _picture_problem(file, decode=depth == "pixels")
            problem = seen[file]
            if problem is not None:
                problems[number, key] = problem

    def _planned_files(self, key: str, problems: dict[tuple[int, str], str]) -> list[tuple[int, PlannedFile]]:
        known: dict[str, list[PlannedFile]] = {}
        found: list[tuple[int, PlannedFile]] = []
        for number, value in enumerate(self._table.columns[key]):
            if value is ABSENT:
                try:
                    self._require_file_key(self._table.row(number))
                except UserError as error:
                    problems[number, key] = str(error)
                continue
            files = known.get(value) if isinstance(value, str) else None
            if files is None:
                try:
                    leaves = self._leaves(key, self._prefixed(value) if key in self._file_columns else value)
                except UserError as error:
                    problems[number, key] = str(error)
                    continue
                files = [leaf for leaf in leaves if isinstance(leaf, PlannedFile)]
                if isinstance(value, str):
                    known[value] = files
            found.extend((number, file) for file in files)
        return found

    def _require_file_key(self, row: Mapping[str, Any]) -> None:
        # a row of json metadata may lack some of the columns, but names at least one file
        if self.data_file_keys and row.keys().isdisjoint(self.data_file_keys):
            raise UserError(f"the row has none of the columns {', '.join(self.data_file_keys)}; name a file.")

    def _read_bucket(self, item: int, number: int) -> tuple[int, int] | None:
        row = self.row(item)
        for key in self._present_keys():
            if key not in row:
                continue
            with self._naming(number, key):
                for leaf in self._leaves(key, row[key]):
                    if isinstance(leaf, PlannedFile) and leaf.resizers is not None:
                        size = _planned_size(leaf)
                        return self._known_sizes.setdefault(size, size)
        return None

    def _leaves(self, key: str, value: Any) -> list[Any]:
        """What the column's operator will read, as far as can be told without opening a file."""
        leaves = _flatten(self._operators[key].plan(value))
        if key not in self.data_file_keys:
            return leaves
        # an operator that cannot be planned, but the column is known to name files
        return [PlannedFile(self.base_path, leaf) if isinstance(leaf, str) else leaf for leaf in leaves]

    def _content(self, leaf: Any) -> str:
        return self._hasher(leaf.path()) if isinstance(leaf, PlannedFile) else _as_text(leaf)

    def _draw(self, number: int, variant: int) -> Draw:
        if not 0 <= variant < self.num_variants:
            raise ValueError(f"variant must be in [0, {self.num_variants}), got {variant}.")
        digits: dict[str, int] = {}
        for purpose, radix in self._radices.items():
            variant, digits[purpose] = divmod(variant, radix)
        return Draw(self.seed, number, digits)

    def _row_number(self, item: int) -> int:
        index = operator.index(item)
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of a data set of {len(self)}")
        return index % self.num_rows

    def _prefixed(self, value: Any) -> Any:
        if not self._file_prefix:
            return value
        if isinstance(value, list):
            return [self._prefixed(element) for element in value]
        return self._file_prefix + value if isinstance(value, str) and value else value

    def _present_keys(self) -> list[str]:
        return [key for key in self.data_file_keys if key in self._operators]

    def _place(self, number: int, key: str) -> str:
        return f"{self.metadata_path}, row {number + 1}, column {key!r}"

    @contextmanager
    def _naming(self, number: int, key: str) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"{self._place(number, key)}: {error}") from error

    def _rename_columns(self, asked: set[str]) -> None:
        main = self.data_file_keys[0] if len(self.data_file_keys) == 1 else "image"
        for old, new in {**_ALIASES, "file_name": main}.items():
            columns = self._table.columns
            if old in columns and new not in columns and old not in asked:
                self._table.columns = {new if name == old else name: column for name, column in columns.items()}

    def _require_file_columns(self) -> None:
        missing = [key for key in self.data_file_keys if key not in self._table.columns]
        interchangeable = {"image", "video"}
        present = interchangeable & set(self.data_file_keys) - set(missing)
        if not (present and set(missing) <= interchangeable):
            self.require_columns(*missing)

    def require_columns(self, *names: str) -> None:
        """Make sure that the metadata has these columns.

        Raises:
            UserError: one is missing; says which there are.
        """
        found = list(self._table.columns)
        for name in names:
            if name not in found:
                raise UserError(
                    f"{self.metadata_path} has no column {name!r}; it has {', '.join(found)}."
                    f"{did_you_mean(name, found)}"
                )

    def _forget(self) -> None:
        self._hasher = FileHasher()
        self._descriptions: dict[str, str] = {}
        self._buckets: dict[int, tuple[int, int] | None] = {}
        self._known_sizes: dict[tuple[int, int], tuple[int, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # workers load samples: what was learnt about files stays here
        learnt = ("_hasher", "_descriptions", "_buckets", "_known_sizes")
        return {name: value for name, value in self.__dict__.items() if name not in learnt}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _as_path(path: str | Path | None) -> Path | None:
    return None if path is None or str(path) == "" else Path(path)


def _prefix(folder: Path | None, base: Path) -> str:
    """What turns file names relative to ``folder`` into names relative to ``base``."""
    if folder is None or not folder.is_relative_to(base) or folder == base:
        return ""
    return folder.relative_to(base).as_posix() + "/"


def _radices(operators: Iterable[Operator]) -> dict[str, int]:
    found: dict[str, int] = {}
    for column_operator in operators:
        for purpose, count in column_operator.variants().items():
            found[purpose] = max(count, found.get(purpose, 1))
    return dict(sorted(found.items()))


def _flatten(value: Any) -> list[Any]:
    if type(value) in (list, tuple):  # a PlannedFile is a leaf
        return [leaf for element in value for leaf in _flatten(element)]
    return [value]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=repr)


def _planned_size(file: PlannedFile) -> tuple[int, int]:
    height, width = read_size(file.path())
    for resizer in file.resizers or ():
        height, width = resizer.output_size(height, width)
    return height, width


def _picture_problem(file: PlannedFile, decode: bool) -> str | None:
    try:
        if file.resizers is not None:
            _planned_size(file)
        if decode:
            read_image(file.path())
    except UserError as error:
        return str(error)
    return None
