"""Downloads from the Hugging Face hub that continue where they stopped.

``snapshot_download`` of huggingface_hub 2 throws away the partial file of an interrupted process, which for these
files means tens of gigabytes; its own building blocks can continue one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.parse import urlparse

from ..errors import UserError

RECORDS = ".cache/diffsynth"
_SHA256 = re.compile("[0-9a-f]{64}")


def fetch_huggingface(model_id: str, globs: Sequence[str], folder: Path) -> None:
    """Bring every file of a repository that matches into ``folder``, under its name in the repository.

    Files that are complete stay; a partial file left by an interrupted run is continued.

    Raises:
        OSError: the hub refuses or cannot be reached, or a file does not arrive whole.
    """
    from huggingface_hub import HfApi

    info = HfApi().model_info(model_id)
    for sibling in info.siblings or []:
        name = sibling.rfilename
        if any(fnmatch(name, glob) for glob in globs):
            if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts:
                raise UserError(f"{model_id} names a file outside its folder ({name!r}); it was refused.")
            _fetch_file(model_id, name, info.sha, folder)


def _fetch_file(model_id: str, name: str, revision: str | None, folder: Path) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(model_id, name, revision=revision)
    remote = get_hf_file_metadata(url)
    if remote.etag is None or remote.size is None:
        raise OSError(f"the hub does not say what {name} is")
    target, record = folder / name, folder / RECORDS / f"{name}.json"
    if _is_current(target, record, remote.etag, remote.size):
        return
    headers = build_hf_headers()
    location = remote.location or url
    if urlparse(location).netloc != urlparse(url).netloc:
        headers.pop("authorization", None)  # storage is another host, and its address is signed
    partial = record.with_name(f"{record.stem}.{remote.etag[:16]}.incomplete")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as file:
        done = file.tell()
        http_get(location, file, resume_size=done, headers=headers, expected_size=remote.size, displayed_filename=name)
    _check(partial, name, remote.etag, remote.size, continued=done > 0)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(target)
    record.write_text(json.dumps({"etag": remote.etag, "size": remote.size}), encoding="utf-8")


def _is_current(target: Path, record: Path, etag: str, size: int) -> bool:
    """The file is whole and, as far as was noted when it came, that of the hub."""
    if not target.is_file() or target.stat().st_size != size:
        return False
    return not record.is_file() or json.loads(record.read_text(encoding="utf-8")).get("etag") == etag


def _check(partial: Path, name: str, etag: str, size: int, continued: bool) -> None:
    """A file in two pieces is checked against the hub's hash, where the hub gives one."""
    whole = partial.stat().st_size == size
    if whole and continued and _SHA256.fullmatch(etag):
        digest = hashlib.sha256()
        with partial.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        whole = digest.hexdigest() == etag
    if not whole:
        partial.unlink()
        raise OSError(f"{name} arrived damaged and was discarded")
