"""What can be wrong with captions that are there: empty, repeated, damaged, or longer than a text encoder takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .findings import Finding, shortened

_WORDS_AT_ONCE = 512  # captions sent to a tokenizer together
TOKENS_PER_WORD = 4 / 3
"""Estimate for English text where no tokenizer is given."""


@dataclass(frozen=True)
class TokenLimit:
    """How much of a caption one text encoder sees.

    Args:
        name: As the pipeline calls its tokenizer, or what the estimate is made from.
        limit: Tokens, those that mark begin and end among them.
        measure: Captions -> for each the number of its tokens, and the text that is cut away ("" for none).
        is_estimate: Whether the count is a guess.
    """

    name: str
    limit: int
    measure: Callable[[Sequence[str]], list[tuple[int, str]]]
    is_estimate: bool = False


def estimated_limit(limit: int) -> TokenLimit:
    """A limit in tokens where no tokenizer is at hand: so many tokens to a word."""
    def measure(captions: Sequence[str]) -> list[tuple[int, str]]:
        kept = int(limit / TOKENS_PER_WORD)
        split = [caption.split() for caption in captions]
        return [(round(len(words) * TOKENS_PER_WORD), " ".join(words[kept:])) for words in split]

    return TokenLimit(f"an estimate of {TOKENS_PER_WORD:.2f} tokens a word", limit, measure, is_estimate=True)


def lint_captions(captions: Sequence[tuple[int, str]], limits: Sequence[TokenLimit]) -> Iterator[Finding]:
    """Findings about captions.

    Args:
        captions: (row from 1, caption); a row with several captions comes several times.
        limits: Of the text encoders; a caption that one of them sees whole is worth a note, not a warning.
    """
    rows_of: dict[str, list[int]] = {}
    for row, caption in captions:
        rows_of.setdefault(caption.strip(), []).append(row)
    if empty := rows_of.pop("", []):
        yield Finding("empty caption", "warning", f"{len(empty)} captions are empty.", tuple(empty))
    for caption, rows in rows_of.items():
        distinct = tuple(dict.fromkeys(rows))
        if len(distinct) > 1:
            everywhere = len(rows_of) == 1 and not empty
            yield Finding(
                "same caption", "note" if everywhere else "warning",
                f"{'all' if everywhere else len(distinct)} rows have the caption {shortened(caption)!r}.", distinct)
        if "\ufffd" in caption:
            yield Finding("damaged caption", "warning", "the caption holds U+FFFD, which stands where text was read "
                          f"in the wrong encoding: {shortened(caption)!r}.", distinct)
    yield from _too_long(rows_of, limits)


def _too_long(rows_of: dict[str, list[int]], limits: Sequence[TokenLimit]) -> Iterator[Finding]:
    captions = list(rows_of)
    for start in range(0, len(captions), _WORDS_AT_ONCE):
        some = captions[start : start + _WORDS_AT_ONCE]
        measured = [limit.measure(some) for limit in limits]
        for index, caption in enumerate(some):
            lost = [(limit, *found[index]) for limit, found in zip(limits, measured, strict=True) if found[index][1]]
            seen_whole = len(lost) < len(limits)
            for limit, count, cut in lost:
                about = "about " if limit.is_estimate else ""
                yield Finding(
                    "long caption", "note" if seen_whole else "warning",
                    f"{about}{count} tokens by {limit.name}, of which {limit.limit} are seen; cut: {shortened(cut)!r}",
                    tuple(dict.fromkeys(rows_of[caption])))
