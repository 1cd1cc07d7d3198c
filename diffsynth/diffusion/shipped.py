"""The pipeline that is being trained, for a while as anyone else would load it: from files, without what is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .drawing import LoraUse, load_loras

if TYPE_CHECKING:
    from .base_pipeline import BasePipeline
    from .training_module import DiffusionTrainingModule


@dataclass(frozen=True)
class SavedFiles:
    """Weight files of one step; none before the first, where the base model stands as it is."""

    full: Path | None = None
    """Holds the fully trained networks."""
    lora: Path | None = None

    @classmethod
    def of(cls, model: DiffusionTrainingModule, written: Sequence[Path]) -> SavedFiles:
        """Which of the files that ``ModelLogger.save`` wrote is which."""
        return cls(written[0] if model.full_models else None, written[-1] if model.lora_models else None)

    @property
    def loras(self) -> list[LoraUse]:
        return [LoraUse(self.lora)] if self.lora else []




_NOTES = ("component_configs", "component_fingerprints", "component_paths")


@contextmanager
def as_shipped(
    model: DiffusionTrainingModule, files: SavedFiles
) -> Iterator[tuple[BasePipeline, list[LoraUse]]]:
    """Within this block ``model.pipe`` is what ``diffsynth generate`` makes of the base model and the saved files.

    Adapters in training are taken off and the LoRA file is loaded like any other; fully trained networks give way to
    new ones read from their file, and wait on the CPU. A LoRA that was merged for the training only is not in it. At
    the end every weight is what it was, bit for bit, and networks that were not there before are let go.

    Returns:
        The pipeline, and the LoRA files that are loaded into it.
    Raises:
        UserError: a file cannot be read, or is not of these networks.
    """
    pipe = model.pipe
    components = [component.name for component in pipe.family().components]
    absent = [name for name in components if getattr(pipe, name) is None]
    with ExitStack() as stack:
        stack.callback(pipe.release, absent)
        for name in model.full_models:
            stack.enter_context(_read_anew(pipe, name, files.full))
        stack.enter_context(without_adapters(pipe, set(components) - set(absent) - set(model.full_models)))
        load_loras(pipe, files.loras, pipe.fp8_models)
        yield pipe, files.loras


@contextmanager
def without_adapters(pipe: BasePipeline, names: Iterable[str]) -> Iterator[None]:
    """Within this block these networks have the weights of their files, and no adapters."""
    from ..adapters.set_aside import adapters_set_aside

    pipe.require_models(names := list(names))
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(adapters_set_aside(getattr(pipe, name)))
        yield


@contextmanager
def _read_anew(pipe: BasePipeline, name: str, file: Path | None) -> Iterator[None]:
    """A network as its file gives it, in the pipeline's dtype, in place of the one that is trained."""
    trained = getattr(pipe, name)
    sources = [file] if file else [list(pipe.component_paths[name])]
    notes = {attribute: getattr(pipe, attribute)[name] for attribute in _NOTES}
    device = pipe.device
    _move_weights(trained, torch.device("cpu"))
    try:
        _load(pipe, name, sources)
        yield
    finally:
        for attribute, value in notes.items():
            getattr(pipe, attribute)[name] = value
        setattr(pipe, name, trained)
        _move_weights(trained, device)


def _load(pipe: BasePipeline, name: str, sources: Sequence[Path | list[Path]]) -> None:
    from ..models.loading import load_components

    loaded = load_components(sources, pipe.family(), pipe.torch_dtype, pipe.device, {name})[name]
    assert loaded.module is not None
    setattr(pipe, name, loaded.module.requires_grad_(False).eval())
    for attribute, value in zip(_NOTES, (loaded.config, loaded.fingerprint, loaded.paths), strict=True):
        getattr(pipe, attribute)[name] = value


def _move_weights(module: torch.nn.Module, device: torch.device) -> None:
    """Move the values of the parameters; the parameters themselves stay the ones that the optimizer knows."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(device)
