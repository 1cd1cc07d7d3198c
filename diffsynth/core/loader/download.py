"""Fetching the files of a public repository into the models folder, where the pages show them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from ..errors import UserError
from .files import WEIGHT_SUFFIXES
from .huggingface import fetch_huggingface

logger = logging.getLogger(__name__)

SOURCES = ("modelscope", "huggingface")
_SHARD_TOTAL = re.compile(r"-\d{5}-of-(\d{5})\.[^.]+$")


def download(model_id: str, patterns: Sequence[str], *, source: str, base_path: Path, skip: bool,
             folder: Path | None = None) -> list[Path]:
    """Have files of a repository on this disk.

    Args:
        model_id: Repository on ``source``.
        patterns: Globs within the repository; one that ends in ``/`` is a folder.
        source: ``modelscope`` or ``huggingface``.
        base_path: The models folder; files land in ``<base_path>/<model_id>/<path in the repository>``.
        skip: Use what is there and ask no hub.
        folder: Where the files land instead.
    Returns:
        The files, or the folder where one folder was asked for. Where weights match, only weights.
    Raises:
        UserError: something is missing here and may not or cannot be fetched.
    """
    target = folder or base_path / model_id
    if not skip:
        _fetch(model_id, patterns, source, target)
    missing = [pattern for pattern in patterns if not is_complete(target, pattern)]
    if missing:
        wanted = ", ".join(missing)
        if skip:
            raise UserError(f"{wanted} of {model_id} is not in {target} and downloading is switched off "
                            f"(DIFFSYNTH_SKIP_DOWNLOAD); fetch {wanted} from {repository_url(model_id, source)} "
                            f"and put it into {target}.")
        raise UserError(f"{repository_url(model_id, source)} has no file {wanted}; "
                        "check origin_file_pattern and the repository's file list.")
    return _result(target, patterns)


def repository_url(model_id: str, source: str) -> str:
    """Where a person finds the repository."""
    if source == "huggingface":
        return f"https://huggingface.co/{model_id}"
    return f"https://modelscope.cn/models/{model_id}"


def is_complete(folder: Path, pattern: str) -> bool:
    """Whether files that match are here, all shards of a set included."""
    files = matching_files(folder, pattern)
    for file in files:
        found = _SHARD_TOTAL.search(file.name)
        if found:
            stem = file.name[: found.start()]
            if not all((file.parent / f"{stem}-{number:05d}-of-{found[1]}{file.suffix}").is_file()
                       for number in range(1, int(found[1]) + 1)):
                return False
    return bool(files)


def matching_files(folder: Path, pattern: str) -> list[Path]:
    """Files below ``folder`` that match; leftovers of interrupted downloads do not count."""
    if not folder.is_dir():
        return []
    glob = pattern + "*" if pattern.endswith("/") else pattern
    files = []
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts) or file.suffix == ".incomplete"
        if not hidden and file.is_file() and fnmatch("/".join(parts), glob):
            files.append(file)
    return files


def _result(folder: Path, patterns: Sequence[str]) -> list[Path]:
    if len(patterns) == 1 and (patterns[0] == "*" or patterns[0].endswith(("/", "/*"))):
        return [folder / patterns[0].rstrip("*")]
    files = dict.fromkeys(file for pattern in patterns for file in matching_files(folder, pattern))
    weights = [file for file in files if file.suffix in WEIGHT_SUFFIXES]
    return weights or list(files)


def _fetch(model_id: str, patterns: Sequence[str], source: str, target: Path) -> None:
    globs = [pattern + "*" if pattern.endswith("/") else pattern for pattern in patterns]
    try:
        if source == "huggingface":
            _fetch_huggingface(model_id, globs, target)
        else:
            _fetch_modelscope(model_id, globs, target)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        if all(is_complete(target, pattern) for pattern in patterns):
            logger.warning("%s could not be asked for %s (%s); using the files in %s.", source, model_id,
                           _reason(error), target)
            return
        raise UserError(f"{', '.join(patterns)} of {model_id} cannot be downloaded from "
                        f"{repository_url(model_id, source)} ({_reason(error)}); repeat the command to continue where "
                        f"it stopped, or put the files into {target}.") from error


def _reason(error: BaseException) -> str:
    """The first line of what the hub's client says, and the kind of error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _fetch_huggingface(model_id: str, globs: list[str], target: Path) -> None:
    from huggingface_hub.errors import HTTPError  # of httpx or httpx2, whichever this version was built on

    try:
        fetch_huggingface(model_id, globs, target)
    except HTTPError as error:
        raise OSError(str(error)) from error


def _fetch_modelscope(model_id: str, globs: list[str], target: Path) -> None:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise UserError("downloads from modelscope need its package: pip install 'diffsynth[modelscope]', "
                        "or set DIFFSYNTH_DOWNLOAD_SOURCE=huggingface.") from error
    from modelscope_hub.errors import HubError

    try:
        snapshot_download(model_id, allow_patterns=globs, local_dir=str(target))
    except HubError as error:
        raise OSError(str(error)) from error
