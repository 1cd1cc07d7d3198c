"""The data set: rows of metadata, with operators applied to the columns that name files."""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..random import keyed_seed
from .describe import describe
from .file_hashes import FileHashes
from .files import FileHasher
from .image_operators import default_image_operator, fixed_size
from .metadata import read_metadata
from .operators import Draw, Identity, Operator, PlannedFile, random_parts
from .row_checks import Depth, find_bad_rows, planned_size
from .rows import BadRow, DataRows

_OPERATORS_VERSION = 1  # raised when an operator gives other pixels than before, so that old caches are not used
_NAMED_ROWS = 20  # of the rows with problems, in one message


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

    A ``prompt`` that is a list holds several captions of one picture: an item shows one of them in each epoch, drawn
    for (seed, epoch, item). Which one is part of the item's *variant*, so that each has its own entries in a cache.

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
        table = read_metadata(base, metadata)
        self.metadata_path = table.source
        if base is None:
            base = metadata if metadata is not None and metadata.is_dir() else table.source.parent
        self.base_path = base
        chosen = {**dict.fromkeys(self.data_file_keys, main_data_operator), **(special_operator_map or {})}
        self.rows = DataRows(table, base, self.data_file_keys, chosen)
        self._operators = self.rows.operators
        self.excluded: tuple[BadRow, ...] | None = None
        """Rows of the metadata that are no part of the data set; None until ``exclude`` has settled which."""
        self._kept: np.ndarray | None = None
        self._radices = _radices(self._operators.values())
        self._fixed_bucket = next((fixed_size(self._operators[k]) for k in self.rows.present_keys), None)
        self._forget()

    def __len__(self) -> int:
        return self.num_rows * self.repeat

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        """The sample of an item, or of an (item, variant)."""
        item, variant = index if isinstance(index, tuple) else (index, 0)
        return self.load(item, variant)

    @property
    def num_rows(self) -> int:
        """Rows that are trained on: those of the metadata without the excluded ones."""
        return len(self.rows) if self._kept is None else len(self._kept)

    @property
    def num_variants(self) -> int:
        """How many different samples the random operators can make of one row, its caption left aside."""
        return math.prod(self._radices.values())

    def num_captions(self, item: int) -> int:
        """How many captions the item's row has: 1, or the length of its list."""
        return self.rows.num_captions(self.row_number(item))

    def variants(self, item: int) -> range:
        """Every variant that the item may show in some epoch: what a cache has to hold of it.

        Variant ``v`` shows caption ``v // num_variants``, and ``v % num_variants`` of the random operators. Two
        variants of equal caption, or of equal picture, have that column in common in their ``fingerprint``.
        """
        return range(self.num_captions(item) * self.num_variants)

    def row(self, item: int) -> dict[str, Any]:
        """The metadata of an item; file names are relative to ``base_path``."""
        return self.rows.row(self.row_number(item))

    def row_number(self, item: int) -> int:
        """The number of an item's row in the metadata, from 0, excluded rows counted too."""
        index = operator.index(item)
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of a data set of {len(self)}")
        number = index % self.num_rows
        return number if self._kept is None else int(self._kept[number])

    def variant(self, item: int, epoch: int) -> int:
        """Which of ``variants(item)`` an item shows in this epoch; drawn uniformly, keyed by (seed, epoch, item).

        Args:
            item: May lie beyond the length, in an epoch that goes round the data set again.
        """
        item = operator.index(item)
        drawn = keyed_seed(self.seed, epoch, item, "augmentation") % self.num_variants
        num_captions = self.num_captions(item % len(self))
        if num_captions > 1:
            drawn += keyed_seed(self.seed, epoch, item, "caption") % num_captions * self.num_variants
        return drawn

    def load(self, item: int, variant: int = 0, columns: Collection[str] | None = None) -> dict[str, Any]:
        """The row with its operators applied and one caption; depends on (seed, row, variant) alone.

        Args:
            variant: One of ``variants(item)``.
            columns: Leave the others out, and their files unopened.
        Raises:
            UserError: a file is missing, damaged, too large or outside the folder; names metadata, row and column.
        """
        number, row, draw = self._draw(item, variant)
        if columns is not None:
            row = {key: value for key, value in row.items() if key in columns}
        for key, column_operator in self._operators.items():
            if key in row:
                with self.rows.naming(number, key):
                    row[key] = column_operator(row[key], draw)
        return row

    def fingerprint(self, item: int, variant: int = 0) -> dict[str, str]:
        """What ``load`` would return, told by content and without decoding.

        Returns:
            For each column the text itself, or for columns with an operator a hash over the content of their files,
            the operator, and those of its random choices that change the outcome. Moved or renamed files keep theirs.
            ``prompt`` is the caption of this variant.
        """
        number, row, draw = self._draw(item, variant)
        prints: dict[str, str] = {}
        for key, value in row.items():
            column_operator = self._operators.get(key)
            if column_operator is None:
                prints[key] = _as_text(value)
                continue
            with self.rows.naming(number, key):
                contents = [self._content(leaf) for leaf in self.rows.leaves(key, value)]
                chosen = random_parts(column_operator)
                # a picture that is not flipped is the one that it is without the operator
                idle = tuple(part for part in chosen if part.is_idle(draw.digits[part.purpose]))
                if (key, idle) not in self._descriptions:
                    self._descriptions[key, idle] = describe(column_operator, idle)
            choices = sorted(draw.describe(part) for part in chosen if part not in idle)
            parts = [_OPERATORS_VERSION, isinstance(value, list), contents, self._descriptions[key, idle], choices]
            prints[key] = hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()
        return prints

    @property
    def file_hashes(self) -> FileHashes:
        """What is known of the content of the files, which a cache remembers between runs."""
        return self._hasher.hashes

    def bucket(self, item: int) -> tuple[int, int] | None:
        """(height, width) of the first picture that the item's file columns will give.

        Read from the file's header at most once; None when the operators do not tell the size.
        """
        if self._fixed_bucket is not None:
            return self._fixed_bucket
        number = self.row_number(item)
        if number not in self._buckets:
            self._buckets[number] = self._read_bucket(number)
        return self._buckets[number]

    def buckets(self) -> list[tuple[int, int] | None]:
        """``bucket`` of every item."""
        if self._fixed_bucket is not None:
            return [self._fixed_bucket] * len(self)
        return [self.bucket(item) for item in range(self.num_rows)] * self.repeat

    def check(self, depth: Depth = "files") -> None:
        """Make sure that every file named by the metadata can be used.

        Args:
            depth: ``files``: exists, is not empty, lies inside its folder (listing folders, not opening files);
                ``headers``: also is a picture of an acceptable size; ``pixels``: also decodes.
        Raises:
            UserError: names the rows with a problem, at most twenty of them.
        """
        self.refuse(self.bad_rows(depth))

    def bad_rows(
        self, depth: Depth = "files", captions: Sequence[str] = (), required: Sequence[str] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> list[BadRow]:
        """The rows that cannot be trained on, those that are excluded already left aside; see ``find_bad_rows``."""
        gone = {bad.row for bad in self.excluded or ()}
        sizes: dict[int, tuple[int, int]] = {}
        found = find_bad_rows(self.rows, depth, captions, required, progress, sizes)
        if self._fixed_bucket is None:
            self._buckets.update(sizes)
        return [bad for bad in found if bad.row not in gone]

    def refuse(self, bad_rows: Sequence[BadRow]) -> None:
        """Raise one ``UserError`` that names the rows, if there are any."""
        if not bad_rows:
            return
        first, *others = bad_rows
        message = f"{self.rows.place(first.row - 1, first.column)}: {first.reason}"
        if others:
            named = " ".join(f"[{bad}]" for bad in others[: _NAMED_ROWS - 1])
            rest = f" and {len(others) - _NAMED_ROWS + 1} that are not listed" if len(others) >= _NAMED_ROWS else ""
            message += (f" ({len(others)} more rows have problems: {named}{rest}; see them all with diffsynth check "
                        f"{self.base_path}, or leave them out with --on_bad_item skip.)")
        raise UserError(message)

    def exclude(self, bad_rows: Iterable[BadRow]) -> None:
        """Leave rows out: items are numbered anew over the rows that stay, in the order of the metadata.

        Raises:
            UserError: no row would be left.
        """
        merged = {bad.row: bad for bad in (*bad_rows, *(self.excluded or ()))}
        excluded = tuple(merged[row] for row in sorted(merged))
        if len(excluded) == len(self.rows):
            raise UserError(f"{self.metadata_path}: none of the {len(excluded)} rows can be trained on; {excluded[0]}")
        self.excluded = excluded
        gone = np.array([bad.row - 1 for bad in excluded], np.int64)
        self._kept = np.delete(np.arange(len(self.rows)), gone) if excluded else None

    def require_columns(self, *names: str) -> None:
        """Make sure that the metadata has these columns.

        Raises:
            UserError: one is missing; says which there are.
        """
        self.rows.require_columns(*names)

    def _read_bucket(self, number: int) -> tuple[int, int] | None:
        row = self.rows.row(number)
        for key in self.rows.present_keys:
            if key not in row:
                continue
            with self.rows.naming(number, key):
                for leaf in self.rows.leaves(key, row[key]):
                    if isinstance(leaf, PlannedFile) and leaf.resizers is not None:
                        size = planned_size(leaf)
                        return self._known_sizes.setdefault(size, size)
        return None

    def _content(self, leaf: Any) -> str:
        return self._hasher(leaf.path()) if isinstance(leaf, PlannedFile) else _as_text(leaf)

    def _draw(self, item: int, variant: int) -> tuple[int, dict[str, Any], Draw]:
        """Number and metadata of an item's row, with one caption, and what its random operators shall produce."""
        if variant not in (known := self.variants(item)):
            raise ValueError(f"variant must be in [0, {len(known)}), got {variant}.")
        number = self.row_number(item)
        row = self.rows.row(number)
        self.rows.require_usable(number, row)
        caption, variant = divmod(variant, self.num_variants)
        self.rows.choose_caption(row, number, caption)
        digits: dict[str, int] = {}
        for purpose, radix in self._radices.items():
            variant, digits[purpose] = divmod(variant, radix)
        return number, row, Draw(self.seed, number, digits)

    def _forget(self) -> None:
        self._hasher = FileHasher()
        self._descriptions: dict[tuple[str, tuple[Operator, ...]], str] = {}
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


def _radices(operators: Iterable[Operator]) -> dict[str, int]:
    found: dict[str, int] = {}
    for column_operator in operators:
        for purpose, count in column_operator.variants().items():
            found[purpose] = max(count, found.get(purpose, 1))
    return dict(sorted(found.items()))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=repr)
