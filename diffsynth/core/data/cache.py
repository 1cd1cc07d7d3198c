"""A store of tensors by key, in files that are either complete or absent."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import UserError
from ..loader.writer import save_safetensors

FORMAT_VERSION = "1"
"""Part of every key; a new number makes all older entries unused."""


class CacheStore:
    """Tensors by key under one folder. Several processes may read and write it at once."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def path(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        return self.path(key).exists()

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Store an entry. The file appears complete under its name or not at all."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(path, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {})

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of an entry.

        Raises:
            UserError: the entry was removed or damaged since the run began.
        """
        try:
            return load_file(self.path(key))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"cache entry {self.path(key)} cannot be read ({error}); delete it and start again."
            ) from error


def entry_key(*parts: object) -> str:
    """The key of what is made from ``parts``; every part must print the same in every process."""
    text = "\x1f".join(str(part) for part in (FORMAT_VERSION, *parts))
    return hashlib.blake2b(text.encode("utf-8"), digest_size=20).hexdigest()
