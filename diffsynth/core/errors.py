"""What the user got wrong, said in one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input from the user: the message says what was found, where, and what to do.

    Every front door prints it as one line on stderr and exits with code 2; library callers see a ``ValueError``.
    """


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A suggestion to append to an error message, or an empty string when nothing is close."""
    best = closest(word, choices)
    return f" Did you mean {best!r}?" if best is not None else ""


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that is the fewest slips of the keyboard away; of several, the one that shares most with the word."""
    listed = list(choices)
    alike = difflib.get_close_matches(word, listed, n=5, cutoff=0.6)
    # of a few letters one slip changes too much for a share of letters to tell
    short = [choice for choice in listed if len(choice) <= 4 and num_slips(word, choice) <= 1]
    ranked = [(num_slips(word, choice), -difflib.SequenceMatcher(None, word, choice).ratio(), choice)
              for choice in {*alike, *short}]
    return min(ranked)[2] if ranked else None


def num_slips(word: str, meant: str) -> int:
    """How many letters were left out, added, replaced, or swapped with their neighbour.

    Source: optimal string alignment, Damerau 1964 and Levenshtein 1966.
    """
    before: list[int] = []
    last = list(range(len(meant) + 1))
    for i, letter in enumerate(word, 1):
        row = [i]
        for j, wanted in enumerate(meant, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == meant[j - 2] and word[i - 2] == wanted:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


MAX_MESSAGE = 2000


def one_line(error: object) -> str:
    """A message for a terminal: one line of bounded length in which names from foreign files cannot move the cursor,
    change colours or set the window's title."""
    text = " ".join(str(error).split())
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE * 2 // 3]} ... {text[-MAX_MESSAGE // 3 :]}"
    return printable(text)


def printable(text: str) -> str:
    """A text of one line without characters that a terminal takes for commands, or cannot show at all."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class RunStopped(RuntimeError):
    """A run that cannot go on (numbers that are not finite, no space left); what was saved before stays valid.

    Every front door prints it as one line on stderr and exits with code 3.
    """


class StoppedEarly(RuntimeError):
    """A run that ended on request (SIGTERM, Ctrl-C, ``max_minutes``) with its state saved; it can be continued.

    Every front door prints it as one line on stderr and exits with code 4.
    """
