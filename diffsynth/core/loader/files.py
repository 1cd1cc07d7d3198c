"""Which files belong together: shards, index files and folders."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from ..errors import UserError, did_you_mean

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
MAX_JSON_BYTES = 2**24
"""An index of shards, or a configuration: a few megabytes for the largest models there are."""
STANDARD_NAMES = ("diffusion_pytorch_model", "model", "pytorch_model")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.[^.]+)")


def weight_groups(paths: Path | str | Sequence[Path | str]) -> list[list[Path]]:
    """Sort what a user names into groups of files that are read as one.

    Args:
        paths: A weight file, an index file, a folder of a network, a folder of a whole model, or the list of the
            shards of one network. One shard stands for all of them.
    Returns:
        One list of existing files for every independent set of weights.
    Raises:
        UserError: something is missing or a folder holds no weights.
    """
    if isinstance(paths, (str, Path)):
        return _groups(Path(paths))
    listed = [Path(path) for path in paths]
    if not listed:
        raise UserError("an empty list of model files was given; name at least one.")
    if any(path.is_dir() for path in listed):
        return [group for path in listed for group in _groups(path)]
    merged = [file for path in listed for group in _groups(path) for file in group]
    return [list(dict.fromkeys(merged))]


def check_exists(path: Path) -> None:
    """Raise a ``UserError`` that names the nearest existing neighbour when ``path`` does not exist."""
    if path.exists():
        return
    parent = path.parent
    neighbours = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    hint = did_you_mean(path.name, neighbours) if parent.is_dir() else f" The folder {parent} does not exist either."
    raise UserError(f"model file {path} does not exist; check the path.{hint}")


def _groups(path: Path) -> list[list[Path]]:
    check_exists(path)
    if path.is_dir():
        return _folder_groups(path)
    if path.name.endswith(".index.json"):
        return [_index_files(path)]
    if found := _SHARD.fullmatch(path.name):
        return [_siblings(path, found)]
    return [[path]]


def read_json(path: Path) -> Any:
    """The content of a small JSON file.

    Raises:
        UserError: it cannot be read, or is larger than any index or configuration.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path} has more than {MAX_JSON_BYTES} bytes, which no index or configuration needs; "
                            "it was refused.")
        return json.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON that can be read ({error}); download it again.") from error


def _index_files(index: Path) -> list[Path]:
    content = read_json(index)
    try:
        names = sorted(set(content["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of weight shards ({error!r}); download it again.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or PureWindowsPath(name).name != name or "\0" in name:
            raise UserError(f"{index} names the shard {name!r} outside its own folder; it was refused.")
    files = [index.parent / name for name in names]
    _require(files, f"listed in {index}")
    return files


def _siblings(path: Path, found: re.Match[str]) -> list[Path]:
    stem, _, total, suffix = found.groups()
    if not 1 <= int(total) <= 10_000:
        raise UserError(f"{path} names an impossible number of shards.")
    files = [path.with_name(f"{stem}-{number:05d}-of-{total}{suffix}") for number in range(1, int(total) + 1)]
    _require(files, f"that {path.name} belongs to")
    return files


def _require(files: Sequence[Path], origin: str) -> None:
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(f"shard {missing[0]} {origin} is missing ({len(missing)} of {len(files)} are); download it.")


def _folder_groups(folder: Path) -> list[list[Path]]:
    if (folder / "model_index.json").is_file():
        groups = [group for child in _subfolders(folder) for group in _own_groups(child)]
        if groups:
            return groups
    groups = _own_groups(folder)
    if not groups or not _standard(groups):
        groups += [group for child in _subfolders(folder) for group in _own_groups(child)]
    if not groups:
        names = sorted(entry.name for entry in folder.iterdir())[:5]
        raise UserError(f"folder {folder} holds no weight files ({', '.join(WEIGHT_SUFFIXES)}); "
                        f"it holds {', '.join(names) or 'nothing'}.")
    return groups


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _standard(groups: list[list[Path]]) -> bool:
    """The folder is that of one network, as transformers and diffusers write it."""
    return groups[0][0].name.startswith(STANDARD_NAMES)


def _own_groups(folder: Path) -> list[list[Path]]:
    """Weights directly in a folder; of the several formats and precisions of one network the plain one is taken."""
    for suffix in (".safetensors", ".bin"):
        for name in STANDARD_NAMES:
            if (folder / f"{name}{suffix}").is_file():
                return [[folder / f"{name}{suffix}"]]
            if (folder / f"{name}{suffix}.index.json").is_file():
                return [_index_files(folder / f"{name}{suffix}.index.json")]
    files = sorted(entry for entry in folder.iterdir() if entry.suffix in WEIGHT_SUFFIXES and entry.is_file())
    if any(file.suffix == ".safetensors" for file in files):
        files = [file for file in files if file.suffix == ".safetensors"]
    groups = {tuple(_groups(file)[0]) for file in files}
    return [list(group) for group in sorted(groups)]
