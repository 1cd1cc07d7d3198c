"""Where weights come from: paths on this machine, or files of a public repository."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .download import SOURCES, download
from .files import check_exists


@dataclass(frozen=True)
class ModelConfig:
    """One set of files, given by path or by repository.

    Args:
        path: A weight file, a folder, or the list of the shards of one network.
        model_id: Repository, for example ``black-forest-labs/FLUX.1-dev``; used where ``path`` is not given.
        origin_file_pattern: Files of the repository, a glob or a comma-separated list of globs; ``tokenizer/`` is a
            folder. Default everything.
        download_source: ``modelscope`` or ``huggingface``. Default ``DIFFSYNTH_DOWNLOAD_SOURCE``, else modelscope.
        local_model_path: Folder for downloads. Default ``DIFFSYNTH_MODEL_BASE_PATH``, else ``./models``.
        skip_download: Use only what is on the disk. Default ``DIFFSYNTH_SKIP_DOWNLOAD == "True"``.
    """

    path: str | Path | Sequence[str | Path] | None = None
    model_id: str | None = None
    origin_file_pattern: str | Sequence[str] | None = None
    download_source: str | None = None
    local_model_path: str | Path | None = None
    skip_download: bool | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.model_id is None):
            raise UserError(f"a ModelConfig needs either path or model_id, got path={self.path!r} and "
                            f"model_id={self.model_id!r}.")
        if self.download_source not in (None, *SOURCES):
            raise UserError(f"download_source must be one of {', '.join(SOURCES)}, got {self.download_source!r}.")

    def resolve(self) -> list[Path]:
        """The existing files (or one folder), downloaded first where needed.

        Raises:
            UserError: a path does not exist, or the files can be had neither here nor from the hub.
        """
        if self.path is not None:
            paths = [self.path] if isinstance(self.path, (str, Path)) else list(self.path)
            for path in paths:
                check_exists(Path(path))
            return [Path(path) for path in paths]
        assert self.model_id is not None
        return download(self.model_id, self._patterns(), source=download_source(self.download_source),
                        base_path=model_base_path(self.local_model_path), skip=skip_download(self.skip_download))

    def _patterns(self) -> tuple[str, ...]:
        if not self.origin_file_pattern:
            return ("*",)
        given = self.origin_file_pattern
        listed = given.split(",") if isinstance(given, str) else list(given)
        return tuple(pattern.strip() for pattern in listed if pattern.strip())


def model_base_path(given: str | Path | None = None) -> Path:
    """The models folder: as given, else ``DIFFSYNTH_MODEL_BASE_PATH``, else ``./models``."""
    return Path(given or os.environ.get("DIFFSYNTH_MODEL_BASE_PATH") or "models")


def skip_download(given: bool | None = None) -> bool:
    """Whether nothing may be fetched: as given, else ``DIFFSYNTH_SKIP_DOWNLOAD``."""
    if given is not None:
        return given
    return os.environ.get("DIFFSYNTH_SKIP_DOWNLOAD", "").strip().lower() in ("true", "1", "yes")


def download_source(given: str | None = None) -> str:
    """The hub: as given, else ``DIFFSYNTH_DOWNLOAD_SOURCE``, else modelscope."""
    source = given or os.environ.get("DIFFSYNTH_DOWNLOAD_SOURCE") or "modelscope"
    if source.lower() not in SOURCES:
        raise UserError(f"the download source must be one of {', '.join(SOURCES)}, got {source!r}; "
                        "set DIFFSYNTH_DOWNLOAD_SOURCE.")
    return source.lower()
