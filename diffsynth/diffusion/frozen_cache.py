"""Compute the frozen prefix once per item, keep it on disk, and train from it.

Every unit of the prefix has entries of its own, keyed by everything its output depends on: the content of the file and
the operations applied to it, or the final caption; the weights and the tokenizer; dtype; the constant inputs; and the
unit itself. Equal captions share one entry, a changed picture leaves its caption's entry valid. A unit has one entry
for each value of the columns that it reads: captions are not multiplied by the crops of their picture, nor the reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..core.data.cache import CacheStore, entry_key
from ..core.data.file_hashes import FileHashes
from ..core.errors import UserError
from .cache_keys import CAPTION_COLUMN, columns_of_prefix, unit_fingerprint
from .probe import require_finite
from .unit import Inputs, PipelineUnit, run_unit

if TYPE_CHECKING:
    from ..core.data import UnifiedDataset
    from .training_module import PipelineTrainingModule

MAX_VARIANTS = 64
"""More random variants of a picture are not encoded in advance."""


@dataclass(frozen=True)
class UnitEntries:
    """The entries of one unit: which key belongs to which sample of which row."""

    unit: PipelineUnit
    columns: frozenset[str]
    """Columns of the data set that its outputs depend on."""
    num_variants: int
    """Random variants that make a difference to it: those of the data set, or 1."""
    has_empty_caption: bool
    sources: tuple[int, ...]
    """Earlier units whose outputs it reads, by number."""
    keys: list[tuple[str, ...]]
    """For each row the keys of its first caption, variants 0, 1, ..., then of the next; at last of the empty one."""

    def key(self, row: int, caption: int, variant: int) -> str:
        """The key for one sample; caption -1 is the empty one."""
        keys = self.keys[row]
        if CAPTION_COLUMN not in self.columns:
            caption = 0
        return keys[caption * self.num_variants % len(keys) + variant % self.num_variants]

    def sample(self, row: int, place: int) -> tuple[int, int]:
        """Caption and variant of one of a row's keys."""
        caption, variant = divmod(place, self.num_variants)
        is_last = (caption + 1) * self.num_variants == len(self.keys[row])
        return (-1 if self.has_empty_caption and is_last else caption), variant


@dataclass(frozen=True)
class CacheJob:
    """One entry that is not there, and the sample that it is made from."""

    key: str
    entries: UnitEntries
    row: int
    caption: int
    """Which of the row's captions; -1 is the empty one."""
    variant: int
    needs: tuple[str, ...]
    """Entries of earlier units that have to be there first."""


@dataclass(frozen=True)
class CachePlan:
    """What a data set needs of the cache."""

    units: list[UnitEntries]
    checks: list[tuple[PipelineUnit, frozenset[str]]]
    """Units without outputs, which only refuse bad input, and the columns that they read."""

    def keys(self) -> set[str]:
        """Every entry that is needed."""
        return {key for entries in self.units for row in entries.keys for key in row}

    def missing(self, store: CacheStore) -> list[CacheJob]:
        """The entries that are not there, each once, in the order of the units."""
        jobs: dict[str, CacheJob] = {}
        for entries in self.units:
            for row, keys in enumerate(entries.keys):
                for place, key in enumerate(keys):
                    if key not in jobs and not store.has(key):
                        caption, variant = entries.sample(row, place)
                        needs = tuple(self.units[number].key(row, caption, variant) for number in entries.sources)
                        jobs[key] = CacheJob(key, entries, row, caption, variant, needs)
        return list(jobs.values())

    def rows_missing(self, store: CacheStore) -> int:
        """How many rows have an entry that is not there."""
        rows = zip(*(entries.keys for entries in self.units), strict=True)
        return sum(any(not store.has(key) for keys in row for key in keys) for row in rows)


class CachedDataset:
    """A data set whose items are the outputs of the frozen prefix, read from the store.

    Args:
        use: Keeps the entries from being removed for as long as this object lives.
        num_made: Entries that this process had to make.
    """

    def __init__(
        self, dataset: UnifiedDataset, plan: CachePlan, store: CacheStore, use: object = None, num_made: int = 0
    ) -> None:
        self.dataset, self.store = dataset, store
        self.units = plan.units
        self.num_rows = dataset.num_rows
        self.num_variants = dataset.num_variants
        self.num_made = num_made
        self._use = use

    def __getstate__(self) -> dict[str, Any]:
        # the process that trains speaks for the workers that load for it
        return {**self.__dict__, "_use": None}

    def __len__(self) -> int:
        return len(self.dataset)

    def bucket(self, item: int) -> Any:
        return self.dataset.bucket(item)

    def variant(self, item: int, epoch: int) -> int:
        return self.dataset.variant(item, epoch)

    def load(self, item: int, variant: int = 0, drop_caption: bool = False) -> dict[str, torch.Tensor]:
        """Outputs of the frozen prefix for one item, batch dimension 1."""
        caption, variant = divmod(variant, self.num_variants)
        outputs: dict[str, torch.Tensor] = {}
        for entries in self.units:
            key = entries.key(item % self.num_rows, -1 if drop_caption else caption, variant)
            outputs.update(self.store.get(key))
        return outputs


def plan_cache(module: PipelineTrainingModule, dataset: UnifiedDataset, hashes: FileHashes) -> CachePlan:
    """Which entries the data set needs.

    Args:
        module: Training module; its ``prefix`` says what is frozen.
        dataset: The pictures and captions.
        hashes: What is known of the content of the networks' files.
    Raises:
        UserError: a file cannot be read, or a picture has too many random variants.
    """
    both = list(zip(module.prefix.units, columns_of_prefix(module), strict=True))
    units: list[UnitEntries] = []
    for unit, read in both:
        if unit.outputs:
            units.append(_describe_unit(unit, read, module, dataset, units))
    plan = CachePlan(units, [(unit, read) for unit, read in both if not unit.outputs])
    fingerprints = [unit_fingerprint(module, entries.unit, hashes) for entries in units]
    wanted = [sorted(entries.columns) for entries in units]
    known: dict[str, str] = {}
    for row in range(dataset.num_rows):
        captions, variants = _values_of_row(dataset, row, any(entries.num_variants > 1 for entries in units))
        for entries, fingerprint, names in zip(units, fingerprints, wanted, strict=True):
            choices: list[str | None] = [None]  # None: what the variant says
            if CAPTION_COLUMN in entries.columns:
                choices = [*(captions if len(captions) > 1 else [None]), *[""] * entries.has_empty_caption]
            keys = [
                entry_key(fingerprint, *(
                    caption if name == CAPTION_COLUMN and caption is not None else variants[number].get(name, "")
                    for name in names))
                for caption in choices for number in range(entries.num_variants)
            ]
            entries.keys.append(tuple(known.setdefault(key, key) for key in keys))
    return plan


def _describe_unit(
    unit: PipelineUnit, columns: frozenset[str], module: PipelineTrainingModule, dataset: UnifiedDataset,
    earlier: Sequence[UnitEntries],
) -> UnitEntries:
    is_random = any(operator.variants() for column, operator in dataset.rows.operators.items() if column in columns)
    num_variants = dataset.num_variants if is_random else 1
    if num_variants > MAX_VARIANTS:
        raise UserError(
            f"{type(unit).__name__} cannot be cached: the data set's random operators make {num_variants} different "
            f"samples of each row, and at most {MAX_VARIANTS} are encoded in advance. Give the operators fewer "
            "variants, or set --cache off, which encodes in every step.")
    reads = {*unit.inputs, *unit.prompt_inputs}
    sources = tuple(number for number, entries in enumerate(earlier) if reads & set(entries.unit.outputs))
    drops = CAPTION_COLUMN in columns and module.config.caption_dropout > 0
    return UnitEntries(unit, columns, num_variants, drops, sources, [])


def _values_of_row(
    dataset: UnifiedDataset, row: int, every_variant: bool
) -> tuple[list[str], list[dict[str, str]]]:
    """A row's captions, and for each random variant the fingerprint of every column."""
    count = dataset.num_variants
    variants = [dataset.fingerprint(row, variant) for variant in range(count if every_variant else 1)]
    more = [dataset.fingerprint(row, caption * count)[CAPTION_COLUMN]
            for caption in range(1, dataset.num_captions(row))]
    return [variants[0].get(CAPTION_COLUMN, ""), *more], variants


@torch.no_grad()
def encode_job(
    module: PipelineTrainingModule, dataset: UnifiedDataset, plan: CachePlan, store: CacheStore, job: CacheJob
) -> dict[str, torch.Tensor]:
    """Compute one entry."""
    unit, columns = job.entries.unit, job.entries.columns
    variant = max(job.caption, 0) * dataset.num_variants + job.variant
    data = dataset.load(job.row, variant, columns)
    if job.caption < 0:
        data = {**data, CAPTION_COLUMN: ""}
    shared, posi, nega = module.pipeline_inputs(data)
    for number, key in zip(job.entries.sources, job.needs, strict=True):
        stored = {name: tensor.to(module.pipe.device) for name, tensor in store.get(key).items()}
        _side(plan.units[number].unit, shared, posi).update(stored)
    for check in (check for check, read in plan.checks if read <= columns):
        run_unit(check, module.pipe, shared, posi, nega)
    run_unit(unit, module.pipe, shared, posi, nega)
    side = _side(unit, shared, posi)
    outputs = {name: side[name] for name in unit.outputs if side.get(name) is not None}
    require_finite(outputs, dataset, job.row)
    return outputs


def _side(unit: PipelineUnit, shared: Inputs, posi: Inputs) -> Inputs:
    return posi if unit.prompt_inputs else shared


def describe_unit(unit: PipelineUnit) -> str:
    """What ``diffsynth cache stats`` calls the entries of a unit."""
    return f"{type(unit).__name__} ({', '.join(unit.models)})" if unit.models else type(unit).__name__
