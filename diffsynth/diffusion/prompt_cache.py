"""The encoded prompts of the sample pictures, in the same cache as the captions of the data set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..core.data.cache import CacheStore, entry_key
from ..core.data.cache_uses import register_use
from ..core.data.file_hashes import FileHashes
from ..core.errors import UserError
from .cache_keys import network_fingerprint, tokenizer_fingerprint
from .unit import PipelineUnit

if TYPE_CHECKING:
    from .base_pipeline import BasePipeline

logger = logging.getLogger(__name__)


class PromptCache:
    """Outputs of the units that read a prompt, as the public pipeline calls them, by unit and text.

    A folder that cannot be written is no reason to end a run here: the prompts are then encoded each time.

    Args:
        pipe: Pipeline whose networks are known, loaded or not.
        units: Units that read the prompt.
        folder: The cache.
        run: Output folder of the run, for people who ask what is in the cache.
    """

    def __init__(self, pipe: BasePipeline, units: Sequence[PipelineUnit], folder: Path, run: str) -> None:
        self.folder, self.run, self.device = folder, run, pipe.device
        memory, hashes = folder / "file_hashes" / "weights.json", FileHashes()
        hashes.recall(memory)
        self._fingerprints = [_fingerprint(pipe, unit, hashes) for unit in units]
        self._store = CacheStore(folder)
        self._used: set[str] = set()
        self._try_to(lambda: hashes.save(memory))

    def get(self, unit: int, text: str) -> dict[str, torch.Tensor] | None:
        """What a unit makes of a text, or None where it is not known."""
        key = self._key(unit, text)
        if not self._store.has(key):
            return None
        return {name: tensor.to(self.device) for name, tensor in self._store.get(key).items()}

    def add(self, unit: int, text: str, outputs: dict[str, torch.Tensor]) -> None:
        key = self._key(unit, text)
        self._try_to(lambda: self._store.add(key, outputs, "sample prompt"))

    def close(self) -> None:
        """Write what was added, and note that this run uses it."""
        self._try_to(self._store.flush)
        self._try_to(lambda: register_use(self.folder, self._used, self.run).end())

    def _key(self, unit: int, text: str) -> str:
        key = entry_key("sample prompt", self._fingerprints[unit], text)
        self._used.add(key)
        return key

    @staticmethod
    def _try_to(write: Callable[[], object]) -> None:
        try:
            write()
        except (OSError, UserError) as error:
            logger.info("the sample prompts are not kept in the cache: %s", error)


def _fingerprint(pipe: BasePipeline, unit: PipelineUnit, hashes: FileHashes) -> str:
    parts: list[object] = [f"{type(unit).__module__}.{type(unit).__qualname__}", unit.version, pipe.torch_dtype]
    parts += [(network_fingerprint(pipe, name, hashes), name in pipe.fp8_models) for name in unit.models]
    parts += [tokenizer_fingerprint(getattr(pipe, name)) for name in pipe.family().tokenizers]
    return entry_key(*parts, sorted(pipe.token_limits().items()))
