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
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


class RunStopped(RuntimeError):
    """A run that cannot go on (numbers that are not finite, no space left); what was saved before stays valid.

    Every front door prints it as one line on stderr and exits with code 3.
    """
