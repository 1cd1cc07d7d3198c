"""Pipeline units: the steps from what the caller gives to what the denoiser needs, in inference and in training.

A unit declares what it reads, what it writes and which models it uses. From that the engine derives the *frozen
prefix*: the units whose outputs depend only on frozen models and on the data, and which can therefore be computed once
and cached, after which the models that only they use are released.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from .base_pipeline import BasePipeline

Inputs = dict[str, Any]


class PipelineUnit:
    """One step of a pipeline. Subclasses declare their edges at the top and implement ``process``."""

    inputs: ClassVar[tuple[str, ...]] = ()
    """Shared inputs that ``process`` takes as keyword arguments; None where the caller gave nothing."""
    prompt_inputs: ClassVar[tuple[str, ...]] = ()
    """Inputs that exist once for the prompt and once, as ``negative_<name>``, for the negative prompt. A unit with
    any of these runs for both sides and writes its outputs to both."""
    outputs: ClassVar[tuple[str, ...]] = ()
    models: ClassVar[tuple[str, ...]] = ()
    """Attributes of the pipeline that hold the networks it uses."""
    draws_noise: ClassVar[bool] = False
    """True when the output changes from one call to the next, so that it can never be cached."""
    version: ClassVar[int] = 1
    """Raised when ``process`` gives other outputs than before, so that older cache entries are not used."""

    def process(self, pipe: BasePipeline, **inputs: Any) -> Inputs:
        """Compute ``outputs`` from ``inputs`` and ``prompt_inputs``."""
        raise NotImplementedError


def run_unit(
    unit: PipelineUnit, pipe: BasePipeline, inputs_shared: Inputs, inputs_posi: Inputs, inputs_nega: Inputs
) -> tuple[Inputs, Inputs, Inputs]:
    """Run one unit over the three input dictionaries and return them with its outputs added.

    The negative side is left out when ``cfg_scale`` is 1, where it has no influence. A side whose outputs were all
    given by the caller (precomputed embeddings) is not computed again.
    """
    if not unit.prompt_inputs:
        if not _given(unit, inputs_shared):
            inputs_shared.update(_process(unit, pipe, {name: inputs_shared.get(name) for name in unit.inputs}))
        return inputs_shared, inputs_posi, inputs_nega
    sides = [(inputs_posi, "")]
    if inputs_shared.get("cfg_scale", 1) != 1:
        sides.append((inputs_nega, "negative_"))
    for side, prefix in sides:
        if _given(unit, side):
            continue
        arguments = {name: inputs_shared.get(name) for name in unit.inputs}
        arguments.update({name: side.get(prefix + name) for name in unit.prompt_inputs})
        side.update(_process(unit, pipe, arguments))
    return inputs_shared, inputs_posi, inputs_nega


def _given(unit: PipelineUnit, side: Inputs) -> bool:
    return bool(unit.outputs) and all(side.get(name) is not None for name in unit.outputs)


def _process(unit: PipelineUnit, pipe: BasePipeline, arguments: Inputs) -> Inputs:
    pipe.require_models(unit.models)
    outputs = unit.process(pipe, **arguments)
    undeclared = sorted(set(outputs) - set(unit.outputs))
    assert not undeclared, f"{type(unit).__name__} wrote undeclared outputs {undeclared}"
    return outputs


@dataclass(frozen=True)
class FrozenPrefix:
    """The part of a pipeline that training never changes."""

    units: tuple[PipelineUnit, ...]
    """Units that need to run only once per item, in order."""
    remaining: tuple[PipelineUnit, ...]
    """Units that must run in every step."""
    outputs: tuple[str, ...]
    """Names that the cache has to hold."""
    released_models: tuple[str, ...]
    """Models that nothing outside the prefix uses."""


def frozen_prefix(
    units: Sequence[PipelineUnit], trainable_models: Collection[str], denoiser_models: Iterable[str]
) -> FrozenPrefix:
    """Split the units into those that can be computed once per item and those that cannot.

    Args:
        units: The pipeline's units in order.
        trainable_models: Pipeline attributes of which any weight is trained, adapters included.
        denoiser_models: Pipeline attributes that ``model_fn`` uses.
    """
    changing: set[str] = set()
    frozen: list[PipelineUnit] = []
    remaining: list[PipelineUnit] = []
    for unit in units:
        reads = {*unit.inputs, *unit.prompt_inputs}
        if unit.draws_noise or set(unit.models) & set(trainable_models) or reads & changing:
            changing.update(unit.outputs)
            remaining.append(unit)
        else:
            frozen.append(unit)
    kept = {name for unit in remaining for name in unit.models} | set(denoiser_models) | set(trainable_models)
    released = dict.fromkeys(name for unit in frozen for name in unit.models if name not in kept)
    outputs = tuple(dict.fromkeys(name for unit in frozen for name in unit.outputs))
    return FrozenPrefix(tuple(frozen), tuple(remaining), outputs, tuple(released))
