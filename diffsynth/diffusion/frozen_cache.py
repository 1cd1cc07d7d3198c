"""Compute the frozen prefix once per item, keep it on disk, and train from it.

Every unit of the prefix has entries of its own, keyed by everything its output depends on: the content of the file and
the operations applied to it, or the final caption; the weights and the tokenizer; dtype; the constant inputs; and the
unit itself. Equal captions share one entry, a changed picture leaves its caption's entry valid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..adapters.fused import fused_fingerprint
from ..core.data.cache import CacheStore, entry_key
from ..core.errors import UserError
from .unit import PipelineUnit, run_unit

if TYPE_CHECKING:
    from ..core.data import UnifiedDataset
    from .training_module import PipelineTrainingModule

INPUT_COLUMNS = {"input_image": "image", "height": "image", "width": "image"}
"""Inputs of the units that are made from another column of the data set than the one of their name."""


@dataclass(frozen=True)
class CacheJob:
    """One (item, variant, caption dropped or not) and the keys of its entries, one per unit of the prefix."""

    item: int
    variant: int
    drop_caption: bool
    keys: tuple[str, ...]


@dataclass(frozen=True)
class CachePlan:
    """What a data set needs of the cache."""

    store: CacheStore
    jobs: list[CacheJob]
    owners: list[tuple[CacheJob, frozenset[str]]]
    """Jobs with the entries that each of them has to provide; one that several jobs share belongs to the first. The
    list depends on the data set alone, so that every process comes to the same shares whatever the others have
    written meanwhile."""

    def missing(self, rank: int = 0, num_processes: int = 1) -> list[CacheJob]:
        """Jobs in this process's share of which an entry is not in the store yet."""
        share = self.owners[rank::num_processes]
        return [job for job, keys in share if not all(self.store.has(key) for key in keys)]


class CachedDataset:
    """A data set whose items are the outputs of the frozen prefix, read from the store."""

    def __init__(self, dataset: UnifiedDataset, plan: CachePlan) -> None:
        self.dataset = dataset
        self.store = plan.store
        self.keys = {(job.item, job.variant, job.drop_caption): job.keys for job in plan.jobs}
        self.num_rows = dataset.num_rows
        self.num_variants = dataset.num_variants

    def __len__(self) -> int:
        return len(self.dataset)

    def bucket(self, item: int) -> Any:
        return self.dataset.bucket(item)

    def variant(self, item: int, epoch: int) -> int:
        return self.dataset.variant(item, epoch)

    def load(self, item: int, variant: int = 0, drop_caption: bool = False) -> dict[str, torch.Tensor]:
        """Outputs of the frozen prefix for one item, batch dimension 1."""
        outputs: dict[str, torch.Tensor] = {}
        for key in self.keys[item % self.num_rows, variant, drop_caption]:
            outputs.update(self.store.get(key))
        return outputs


def plan_cache(module: PipelineTrainingModule, dataset: UnifiedDataset, folder: Path) -> CachePlan:
    """Which entries the data set needs, and which of them are still to be computed.

    Args:
        module: Training module; its ``prefix`` says what is frozen.
        dataset: The pictures and captions.
        folder: Where the entries are kept.
    """
    store = CacheStore(folder)
    jobs = list(_jobs(module, dataset))
    claimed: set[str] = set()
    owners: list[tuple[CacheJob, frozenset[str]]] = []
    for job in jobs:
        if own := frozenset(job.keys) - claimed:
            claimed |= own
            owners.append((job, own))
    return CachePlan(store, jobs, owners)


def _jobs(module: PipelineTrainingModule, dataset: UnifiedDataset) -> Iterator[CacheJob]:
    units = [unit for unit in module.prefix.units if unit.outputs]
    fingerprints = [_unit_fingerprint(module, unit) for unit in units]
    columns = _columns_of_units(units)
    for item in range(dataset.num_rows):
        for variant in range(dataset.num_variants):
            values = dataset.fingerprint(item, variant)
            for drop in (False, True) if module.config.caption_dropout > 0 else (False,):
                final = {**values, "prompt": ""} if drop else values
                keys = tuple(
                    entry_key(fingerprint, *(final.get(column, "") for column in wanted))
                    for fingerprint, wanted in zip(fingerprints, columns, strict=True)
                )
                yield CacheJob(item, variant, drop, keys)


def _columns_of_units(units: Sequence[PipelineUnit]) -> list[list[str]]:
    """Columns of the data set that each unit depends on, through earlier units too."""
    made_from: dict[str, set[str]] = {}
    result = []
    for unit in units:
        columns: set[str] = set()
        for name in (*unit.inputs, *unit.prompt_inputs):
            columns |= made_from.get(name, {INPUT_COLUMNS.get(name, name)})
        for output in unit.outputs:
            made_from[output] = columns
        result.append(sorted(columns))
    return result


def _unit_fingerprint(module: PipelineTrainingModule, unit: PipelineUnit) -> str:
    pipe = module.pipe
    constants = module.constant_inputs()
    parts: list[object] = [f"{type(unit).__module__}.{type(unit).__qualname__}", pipe.torch_dtype]
    parts += [f"{name}={constants[name]}" for name in unit.inputs if name in constants]
    for name in unit.models:
        parts.append(pipe.component_fingerprints[name])
        parts.append(name in module.fp8_models)
        if getattr(getattr(pipe, name), "_diffsynth_hot_adapters", None):
            raise UserError(f"{name} has a LoRA loaded with hotload=True, which cannot be part of a cache key; load it "
                            "with hotload=False, or train with --cache off.")
        # a LoRA fused into an encoder changes its outputs, but not its files
        parts.append(fused_fingerprint(getattr(pipe, name)))
    if unit.prompt_inputs:
        parts += [_tokenizer_fingerprint(getattr(pipe, name)) for name in pipe.family().tokenizers]
    return entry_key(*parts)


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    text = f"{tokenizer.model_max_length}|{sorted(tokenizer.get_vocab().items())}|{tokenizer.special_tokens_map}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@torch.no_grad()
def encode_job(
    module: PipelineTrainingModule, dataset: UnifiedDataset, store: CacheStore, job: CacheJob
) -> None:
    """Compute and store the entries of one job that are not there yet."""
    data = dataset.load(job.item, job.variant)
    if job.drop_caption:
        data = {**data, "prompt": ""}
    shared, posi, nega = module.pipeline_inputs(data)
    keys = iter(job.keys)
    for unit in module.prefix.units:
        side = posi if unit.prompt_inputs else shared
        key = next(keys) if unit.outputs else None
        if key and store.has(key):
            side.update({name: tensor.to(module.pipe.device) for name, tensor in store.get(key).items()})
            continue
        shared, posi, nega = run_unit(unit, module.pipe, shared, posi, nega)
        if key:
            store.put(key, {name: side[name] for name in unit.outputs if side.get(name) is not None})
