"""Finding and loading the tokenizers of a family."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.loader.config import ModelConfig, download_source, model_base_path, skip_download
from ..core.loader.download import download, repository_url
from .spec import ModelFamily

VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "vocab.txt")
LEVELS_ABOVE = 2


def load_tokenizer(class_path: str, folder_name: str, explicit: ModelConfig | None, near: Iterable[Path],
                   family: ModelFamily) -> Any:
    """Load a tokenizer from the first place that has it.

    The places: ``explicit``; ``folder_name`` beside the weights or up to two folders above; the same folder of the
    family's repositories below the models folder; the family's first repository, downloaded.

    Args:
        class_path: Dotted path of the tokenizer's class.
        folder_name: Its folder in the public repository, for example ``tokenizer_2``.
        explicit: Where the user says it is.
        near: Weight files of the pipeline.
        family: Whose repositories are searched.
    Raises:
        UserError: it is nowhere and may not or cannot be downloaded (says what to fetch and where to put it), or the
            folder holds no tokenizer.
    """
    return _load(class_path, find_tokenizer(folder_name, explicit, near, family))


def find_tokenizer(folder_name: str, explicit: ModelConfig | None, near: Iterable[Path], family: ModelFamily) -> Path:
    """The folder ``load_tokenizer`` reads."""
    if explicit is not None:
        return _explicit_folder(explicit)
    for folder in [*_folders_near(near, folder_name), *_folders_of_family(folder_name, family)]:
        if _has_vocabulary(folder):
            return folder
    return _downloaded(folder_name, family)


def _explicit_folder(explicit: ModelConfig) -> Path:
    path = explicit.resolve()[0]
    folder = path if path.is_dir() else path.parent
    if not _has_vocabulary(folder):
        raise UserError(f"{folder} holds no tokenizer; expected one of {', '.join(VOCABULARY_FILES)} in it.")
    return folder


def _folders_near(near: Iterable[Path], folder_name: str) -> list[Path]:
    folders: dict[Path, None] = {}
    for path in near:
        parent = path.absolute().parent
        for _ in range(LEVELS_ABOVE + 1):
            folders[parent / folder_name] = None
            parent = parent.parent
    return list(folders)


def _folders_of_family(folder_name: str, family: ModelFamily) -> list[Path]:
    base = model_base_path()
    presets = [base / preset.folder for listed in family.presets.values() for preset in listed]
    return [folder / folder_name for folder in [*(base / model_id for model_id in family.model_ids), *presets]]


def _has_vocabulary(folder: Path) -> bool:
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def _downloaded(folder_name: str, family: ModelFamily) -> Path:
    source, base, model_id = download_source(), model_base_path(), family.model_ids[0]
    place = base / model_id / folder_name
    if skip_download():
        raise UserError(f"the tokenizer {folder_name!r} of {family.name} was found neither beside the weights nor in "
                        f"{base}, and downloading is switched off (DIFFSYNTH_SKIP_DOWNLOAD); fetch the folder "
                        f"{folder_name}/ from {repository_url(model_id, source)} and put it at {place}.")
    folder = download(model_id, [f"{folder_name}/"], source=source, base_path=base, skip=False)[0]
    if not _has_vocabulary(folder):
        raise UserError(f"{folder} was downloaded but holds none of {', '.join(VOCABULARY_FILES)}; "
                        f"put the tokenizer at {place}.")
    return folder


def _load(class_path: str, folder: Path) -> Any:
    module, _, name = class_path.rpartition(".")
    tokenizer_class = getattr(importlib.import_module(module), name)
    try:
        return tokenizer_class.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what the Rust library finds wrong in a file is a plain Exception
        reason = str(error).strip().splitlines()
        raise UserError(f"the tokenizer in {folder} cannot be read as {name} "
                        f"({reason[0][:160] if reason else type(error).__name__}); download it again.") from error
