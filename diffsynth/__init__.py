"""Train and run diffusion models for images and video.

The names below are loaded when they are first used, so that ``import diffsynth`` costs almost nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.data import UnifiedDataset
    from .core.errors import UserError
    from .core.loader import ModelConfig
    from .models.download import download_models
    from .models.loading import load_component
    from .models.manager import ModelManager
    from .pipelines.flux import FluxImagePipeline

__version__ = "0.1.0"

_HOMES = {
    "FluxImagePipeline": "pipelines.flux",
    "ModelConfig": "core.loader",
    "ModelManager": "models.manager",
    "UnifiedDataset": "core.data",
    "UserError": "core.errors",
    "download_models": "models.download",
    "load_component": "models.loading",
}

__all__ = [
    "FluxImagePipeline",
    "ModelConfig",
    "ModelManager",
    "UnifiedDataset",
    "UserError",
    "__version__",
    "download_models",
    "load_component",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffsynth' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
