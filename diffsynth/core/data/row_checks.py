"""Finding the rows of a data set that cannot be trained on, before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..errors import UserError
from .files import find_problems
from .image_file import read_image, read_size
from .metadata import ABSENT, TextColumn
from .operators import PlannedFile
from .rows import BadRow, DataRows, caption_problem

Depth = Literal["files", "headers", "pixels"]
Found = TypeVar("Found")
_MOST_THREADS = 16
_BUNCH = 8  # files that one thread reads in a row: handing over each alone costs a third of reading a header
_FEW_FILES = 16  # fewer are read at once by this thread, which costs less than starting others


def find_bad_rows(
    rows: DataRows, depth: Depth, captions: Sequence[str] = (), required: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None, sizes: dict[int, tuple[int, int]] | None = None,
) -> list[BadRow]:
    """Every row that training would refuse, in order, with the first of its problems; see ``find_row_problems``."""
    first: dict[int, BadRow] = {}
    for bad in find_row_problems(rows, depth, captions, required, progress, sizes):
        first.setdefault(bad.row, bad)
    return list(first.values())


def find_row_problems(
    rows: DataRows, depth: Depth, captions: Sequence[str] = (), required: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None, sizes: dict[int, tuple[int, int]] | None = None,
) -> list[BadRow]:
    """Everything for which training would refuse a row, in order of rows and columns.

    Args:
        depth: ``files``: each file exists, is not empty, lies inside its folder (listing folders, not opening files);
            ``headers``: also is a picture of an acceptable size; ``pixels``: also decodes.
        captions: Columns in which every row must have a text, or a list of texts.
        required: Columns in which every row must have something.
        progress: Told how many of how many files were opened.
        sizes: Filled with the (height, width) that the first picture of each row, by its number from 0, comes out
            with, where files are opened.
    """
    problems: dict[tuple[int, str], str] = {
        (number, key): problem for number, (key, problem) in rows.table.problems.items()
    }
    files = {key: _planned_files(rows, key, problems) for key in rows.present_keys}
    for key, planned in files.items():
        by_base: dict[Path, list[tuple[int, str]]] = {}
        for number, file in planned:
            by_base.setdefault(file.base or Path("/"), []).append((number, file.name))
        for base, named in by_base.items():
            for position, problem in find_problems(base, (name for _, name in named)):
                problems.setdefault((named[position][0], key), problem)
    for key in captions:
        for number, problem in _caption_problems(rows, key):
            problems.setdefault((number, key), problem)
    for key in required:
        for number, value in _values_that_may_lack(rows, key):
            if value is ABSENT:
                problems.setdefault((number, key), "the row has no such value; add it.")
    if depth != "files":
        _check_pictures(files, depth == "pixels", problems, progress, {} if sizes is None else sizes)
    return [BadRow(number + 1, key, problem) for (number, key), problem in sorted(problems.items())]


def picture_problem(file: PlannedFile, decode: bool) -> tuple[str | None, tuple[int, int] | None]:
    """Why a picture cannot be loaded or brought to its size, None when it can; and that size, where it is known."""
    size = None
    try:
        if file.resizers is not None:
            size = planned_size(file)
        if decode:
            read_image(file.path())
    except UserError as error:
        return str(error), None
    return None, size


def planned_size(file: PlannedFile) -> tuple[int, int]:
    """(height, width) that a picture will be trained with, from its header alone."""
    height, width = read_size(file.path())
    for resizer in file.resizers or ():
        height, width = resizer.output_size(height, width)
    return height, width


def planned_pictures(rows: DataRows, without: Container[int] = ()) -> dict[PlannedFile, list[int]]:
    """Each picture that the rows name, in their order, and the rows that name it, from 1.

    Args:
        without: Rows that are left aside.
    """
    found: dict[PlannedFile, list[int]] = {}
    for key in rows.present_keys:
        for number, file in _planned_files(rows, key, {}):
            if file.is_loaded and number + 1 not in without:
                found.setdefault(file, []).append(number + 1)
    return found


def _check_pictures(
    files: dict[str, list[tuple[int, PlannedFile]]], decode: bool, problems: dict[tuple[int, str], str],
    progress: Callable[[int, int], None] | None, sizes: dict[int, tuple[int, int]],
) -> None:
    wanted = {
        file: None for key, planned in files.items() for number, file in planned
        if file.is_loaded and (number, key) not in problems
    }
    found: dict[PlannedFile, tuple[str | None, tuple[int, int] | None]] = {}
    equal: dict[tuple[int, int], tuple[int, int]] = {}
    for file, (problem, size) in zip(
        wanted, in_parallel(partial(picture_problem, decode=decode), list(wanted)), strict=True
    ):
        found[file] = problem, equal.setdefault(size, size) if size is not None else None
        if progress is not None:
            progress(len(found), len(wanted))
    for key, planned in files.items():
        for number, file in planned:
            problem, size = found.get(file, (None, None))
            if problem is not None:
                problems.setdefault((number, key), problem)
            elif size is not None:
                sizes.setdefault(number, size)


def in_parallel(
    function: Callable[[PlannedFile], Found], files: list[PlannedFile], num_threads: int = 0
) -> Iterator[Found]:
    """In order, by threads: Pillow lets others work while it decodes."""
    if len(files) < _FEW_FILES or num_threads == 1:
        yield from map(function, files)
        return
    with ThreadPoolExecutor(num_threads or min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        bunches = [files[start : start + _BUNCH] for start in range(0, len(files), _BUNCH)]
        for results in pool.map(lambda bunch: [function(file) for file in bunch], bunches):
            yield from results


def _values_that_may_lack(rows: DataRows, key: str) -> Iterator[tuple[int, Any]]:
    column = rows.table.columns[key]
    return iter(()) if isinstance(column, TextColumn) else enumerate(column)


def _caption_problems(rows: DataRows, key: str) -> Iterator[tuple[int, str]]:
    if key in rows.operators:
        return
    for number, value in _values_that_may_lack(rows, key):
        problem = "the row has no caption; write one." if value is ABSENT else caption_problem(value)
        if problem is not None:
            yield number, problem


def _planned_files(
    rows: DataRows, key: str, problems: dict[tuple[int, str], str]
) -> list[tuple[int, PlannedFile]]:
    known: dict[str, list[PlannedFile]] = {}
    found: list[tuple[int, PlannedFile]] = []
    for number, value in enumerate(rows.table.columns[key]):
        if value is ABSENT:
            try:
                rows.require_file_key(rows.table.row(number))
            except UserError as error:
                problems[number, key] = str(error)
            continue
        files = known.get(value) if isinstance(value, str) else None
        if files is None:
            try:
                leaves = rows.leaves(key, rows.prefixed(value) if key in rows.file_columns else value)
            except UserError as error:
                problems[number, key] = str(error)
                continue
            files = [leaf for leaf in leaves if isinstance(leaf, PlannedFile)]
            if isinstance(value, str):
                known[value] = files
        found.extend((number, file) for file in files)
    return found
