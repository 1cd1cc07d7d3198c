"""What an item of a data set is called in messages."""

from __future__ import annotations

from typing import Any


def rows_of(dataset: Any) -> Any | None:
    """The data set, or the one that it was made of, that knows its rows; None for a data set of the user's own."""
    while not hasattr(dataset, "row") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset if hasattr(dataset, "row") else None


def item_name(dataset: Any, item: int) -> str:
    """``item 3 (image_3.png, row 4)``, with what the data set knows of its files; ``item 3`` otherwise."""
    source = rows_of(dataset)
    if source is None:
        return f"item {item}"
    within = item % len(source)  # an epoch may go round the data set again
    row = source.row(within)
    keys = getattr(source, "data_file_keys", None) or list(row)
    known = [str(row[key]) for key in keys if isinstance(row.get(key), str)]
    if hasattr(source, "row_number"):
        known.append(f"row {source.row_number(within) + 1}")
    return f"item {item} ({', '.join(known)})" if known else f"item {item}"
