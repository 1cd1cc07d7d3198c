"""Named downloads: everything a family needs, landing where the pages show it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..core.errors import UserError, did_you_mean
from ..core.loader.config import download_source, model_base_path, skip_download
from ..core.loader.download import download
from .registry import all_families
from .spec import Preset


def download_models(names: Iterable[str], source: str | None = None, base_path: str | Path | None = None,
                    skip: bool | None = None) -> list[Path]:
    """Download models by name, for example ``download_models(["FLUX.1-dev"])``.

    Interrupted downloads continue where they stopped; what is complete is not fetched again.

    Args:
        names: Names of presets.
        source: ``modelscope`` or ``huggingface``. Default ``DIFFSYNTH_DOWNLOAD_SOURCE``, else modelscope.
        base_path: The models folder. Default ``DIFFSYNTH_MODEL_BASE_PATH``, else ``./models``.
        skip: Only check that everything is there. Default ``DIFFSYNTH_SKIP_DOWNLOAD``.
    Returns:
        The folders of the models.
    Raises:
        UserError: an unknown name (with a suggestion), or files that are missing and cannot be fetched.
    """
    known = presets()
    listed = [names] if isinstance(names, str) else list(names)
    for name in listed:
        if name not in known:
            raise UserError(f"there is no download called {name!r}; known: {', '.join(known)}."
                            f"{did_you_mean(name, known)}")
    chosen, base = download_source(source), model_base_path(base_path)
    folders: dict[Path, None] = {}
    for name in listed:
        for preset in known[name]:
            folder = base / preset.folder
            model_id = preset.huggingface_id if chosen == "huggingface" else preset.model_id
            download(model_id, preset.files, source=chosen, base_path=base, skip=skip_download(skip), folder=folder)
            folders[folder] = None
    return list(folders)


def presets() -> dict[str, tuple[Preset, ...]]:
    """Every name that ``download_models`` knows."""
    return {name: listed for family in all_families() for name, listed in family.presets.items()}
