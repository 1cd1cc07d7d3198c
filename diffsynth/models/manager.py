"""The older way of naming model files: a manager that pipelines take their networks from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..core.errors import UserError

if TYPE_CHECKING:
    from torch.nn import Module


class ModelManager:
    """A list of weight files and LoRAs, from which ``Pipeline.from_model_manager`` builds a pipeline.

    Args:
        torch_dtype: Dtype of the networks.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        file_path_list: Weight files or folders; an inner list holds the shards of one network.
    Raises:
        UserError: a file does not exist.
    """

    def __init__(
        self,
        torch_dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cuda",
        file_path_list: Sequence[str | Path | list] = (),
    ) -> None:
        self.torch_dtype = torch_dtype
        self.device = str(device)
        self.file_path_list: list[str | Path | list] = []
        self._loras: list[tuple[Path, float]] = []
        self._pipelines: list[Module] = []
        self.load_models(file_path_list)

    def load_models(self, file_path_list: Sequence[str | Path | list]) -> None:
        """Add files; their networks are read when a pipeline asks for them."""
        for entry in file_path_list:
            for path in entry if isinstance(entry, list) else [entry]:
                if not Path(path).exists():
                    raise UserError(f"model file {path} does not exist.")
            self.file_path_list.append(entry)

    def load_lora(self, path: str | Path, lora_alpha: float = 1.0) -> None:
        """Add a LoRA to the denoiser of every pipeline built from this manager, before or after this call."""
        if not Path(path).exists():
            raise UserError(f"LoRA file {path} does not exist.")
        self._loras.append((Path(path), lora_alpha))
        for pipe in self._pipelines:
            pipe.load_lora(pipe.denoiser, path, alpha=lora_alpha)  # type: ignore[operator]

    def attach(self, pipe: Module) -> None:
        """Give a pipeline the LoRAs of this manager, now and when more are added."""
        self._pipelines.append(pipe)
        for path, strength in self._loras:
            pipe.load_lora(pipe.denoiser, path, alpha=strength)  # type: ignore[operator]
