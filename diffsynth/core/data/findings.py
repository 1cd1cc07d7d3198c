"""What the linter of data sets reports, as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
_SHOWN = 160


@dataclass(frozen=True)
class Finding:
    """One problem, of one row or several."""

    kind: str
    """In a few words; findings of one kind are counted together."""
    severity: Severity
    """``error``: training refuses the row. ``warning``: worth a look. ``note``: good to know."""
    message: str
    rows: tuple[int, ...] = ()
    """From 1, the header of the metadata not counted; empty for the data set as a whole."""
    files: tuple[str, ...] = ()
    """Relative to the data set's folder."""


@dataclass
class PictureEntry:
    """A picture in the contact sheet."""

    file: str
    rows: tuple[int, ...]
    size: tuple[int, int]
    """(height, width); (0, 0) when it cannot be read."""
    captions: tuple[str, ...]
    thumbnail: bytes = b""


@dataclass
class LintReport:
    """Everything that was found in a data set."""

    dataset: str
    num_rows: int = 0
    num_pictures: int = 0
    findings: list[Finding] = field(default_factory=list)
    buckets: dict[str, int] = field(default_factory=dict)
    """WIDTHxHEIGHT as trained -> rows."""
    measured_by: list[str] = field(default_factory=list)
    """How the length of captions was measured."""
    pictures: list[PictureEntry] = field(default_factory=list)
    """Filled for a contact sheet."""

    def num_rows_with(self, severity: Severity) -> int:
        return len({row for finding in self.findings if finding.severity == severity for row in finding.rows})

    @property
    def is_refused(self) -> bool:
        """Whether training would refuse this data set."""
        return any(finding.severity == "error" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain values, without the pictures."""
        return {
            "dataset": self.dataset, "rows": self.num_rows, "pictures": self.num_pictures,
            "rows_with_errors": self.num_rows_with("error"), "rows_with_warnings": self.num_rows_with("warning"),
            "buckets": self.buckets, "caption_length_by": self.measured_by,
            "findings": [asdict(finding) for finding in self.findings],
        }


def shortened(text: str) -> str:
    """A text cut to what a line of a report can hold."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
