"""Options of ``diffsynth cache``."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..core.options import Options


class CacheFolderOptions(Options):
    """The cache, and how the answer is written."""

    title: ClassVar[str] = "Cache"
    folder: str | None = Field(
        None, min_length=1, description="Folder of the cache. Left out: cache/ in the models folder.",
        json_schema_extra={"positional": True, "metavar": "FOLDER"},
    )
    as_json: bool = Field(False, description="Print JSON instead of tables.", json_schema_extra={"option": "json"})


class CacheStatsConfig(CacheFolderOptions):
    """Say what is in the cache of encoded data, and what of it is used."""


class CacheVerifyConfig(CacheFolderOptions):
    """Read every entry of the cache and name those that are damaged."""

    title: ClassVar[str] = "What to do"
    repair: bool = Field(False, description="Remove what is damaged; the next run that needs it makes it anew.")


class CachePruneConfig(CacheFolderOptions):
    """Remove entries of the cache that no run in progress uses, the longest unused first."""

    title: ClassVar[str] = "What to remove"
    unused_for_days: float | None = Field(None, ge=0, description="Entries that no run has used for this many days.")
    max_gb: float | None = Field(
        None, ge=0, description="Further entries, until the rest takes no more than this; 1 GB = 10^9 bytes."
    )
    dry_run: bool = Field(False, description="Only say what would be removed.")
