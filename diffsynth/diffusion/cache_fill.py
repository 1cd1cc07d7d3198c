"""Bring the cache of the frozen prefix up to date before training starts, together with whoever else needs it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress as ProgressBar

from ..config import TrainConfig
from ..core.data.cache import CacheStore, cannot_write, entry_key
from ..core.data.cache_care import MANY_PACKS, merge_packs
from ..core.data.cache_uses import register_use
from ..core.data.claims import Claims, SignOfLife
from ..core.data.file_hashes import FileHashes
from ..core.data.rows import BadRow, BadRowError
from ..core.device import is_cpu
from ..core.errors import UserError
from ..core.loader import model_base_path
from .bad_items import exclude_together, plan_without_bad
from .frozen_cache import CachedDataset, CacheJob, CachePlan, describe_unit, encode_job, plan_cache
from .progress import progress_bar
from .training_module import PipelineTrainingModule

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..core.data import UnifiedDataset
    from .base_pipeline import BasePipeline

logger = logging.getLogger(__name__)

_POLL_SECONDS = (0.05, 1.0)
"""First and longest wait for entries that other processes are making."""


def can_cache(model: Any, config: TrainConfig) -> bool:
    """Whether training can read cached outputs alone; a trained encoder reads the raw columns in every step."""
    return (
        config.cache != "off" and isinstance(model, PipelineTrainingModule)
        and not any(unit.models for unit in model.prefix.remaining)
    )


def fill_cache(
    accelerator: Accelerator, dataset: Any, model: Any, config: TrainConfig, stop: Callable[[], None] | None = None
) -> CachedDataset:
    """Bring the cache of the frozen prefix up to date, all processes together.

    Args:
        stop: Called before each entry; what it raises ends the filling, and the entries made so far stay.
    Raises:
        UserError: the module has nothing to cache, the folder cannot be written, or ``sft:train`` finds entries
            missing.
    """
    if not can_cache(model, config):
        raise UserError(f"--task {config.task} works on the cache of encoded data; leave --cache at auto, and train no "
                        "text encoder and no VAE.")
    folder = cache_folder(config)
    known = _KnownFiles(folder, dataset)
    num_made = 0
    while True:
        plan = plan_without_bad(accelerator, dataset, config, lambda: plan_cache(model, dataset, known.weights))
        if config.task == "sft:train":
            _require_full(plan, folder, dataset)
        known.save()
        use = _register(folder, plan, config)
        store = CacheStore(folder, plan.keys())
        bad_rows: list[BadRow] = []
        if missing := plan.missing(store):
            if isinstance(use, Exception):
                raise cannot_write(folder, use.__cause__ or use) from use
            filling = _Filling(model, dataset, plan, store, use, stop, config.on_bad_item == "skip")
            with progress_bar(accelerator.is_main_process) as bar, _moved_away(model.pipe):
                num_made += filling.run(missing, bar)
            bad_rows = list(filling.bad_rows.values())
            logger.info("cache %s: %d of %d entries were missing, %d of them made by this process", folder,
                        len(missing), len(plan.keys()), num_made)
        accelerator.wait_for_everyone()
        store.refresh()
        # what a bad row shares with others, such as its caption, is still to be made for them
        if config.on_bad_item != "skip" or not exclude_together(accelerator, dataset, bad_rows):
            return CachedDataset(dataset, plan, store, use, num_made)


def cache_folder(config: TrainConfig) -> Path:
    """Where the run's cache lies."""
    return Path(config.cache_path) if config.cache_path else model_base_path() / "cache"


def _require_full(plan: CachePlan, folder: Path, dataset: UnifiedDataset) -> None:
    store = CacheStore(folder, plan.keys())
    if missing := plan.rows_missing(store):
        raise UserError(f"the cache {folder} lacks {missing} of {dataset.num_rows} items; fill it first with the same "
                        "options and --task sft:data_process.")


class _KnownFiles:
    """What earlier runs learnt about the content of the files of a data set and of networks."""

    def __init__(self, folder: Path, dataset: UnifiedDataset) -> None:
        self.weights = FileHashes()
        self._memories = {
            folder / "file_hashes" / f"{_name(dataset.base_path)}.json": dataset.file_hashes,
            folder / "file_hashes" / "weights.json": self.weights,
        }
        for path, hashes in self._memories.items():
            hashes.recall(path)

    def save(self) -> None:
        """Let the next run know; a cache that can only be read stays as it is."""
        for path, hashes in self._memories.items():
            try:
                hashes.save(path)
            except UserError as error:
                logger.info("the files will be read again by the next run: %s", error)


def _name(folder: Path) -> str:
    return entry_key(folder.absolute())[:16]


def _register(folder: Path, plan: CachePlan, config: TrainConfig) -> SignOfLife | Exception:
    """Say that this run uses its entries; why that is not possible, where the folder can only be read."""
    try:
        return register_use(folder, plan.keys(), config.output_path)
    except (OSError, UserError) as error:
        logger.info("this run is not noted in the cache %s, which cannot be written.", folder)
        return error


@dataclass
class _Filling:
    """The making of what is missing, entry by entry; other processes may be at the same list."""

    model: PipelineTrainingModule
    dataset: UnifiedDataset
    plan: CachePlan
    store: CacheStore
    sign: SignOfLife
    stop: Callable[[], None] | None
    skip_bad: bool
    """Note rows whose files have become bad, instead of ending."""
    bad_rows: dict[int, BadRow] = field(default_factory=dict)
    """By their number in the data set as it is planned."""

    def run(self, missing: list[CacheJob], bar: ProgressBar) -> int:
        """Make or wait for every entry; returns how many were made here."""
        self.claims = Claims(self.sign)
        self.made = 0
        waiting = {job.key: job for job in missing}
        shown = bar.add_task("encoding", total=len(missing), loss="")
        pause = _POLL_SECONDS[0]
        try:
            while waiting:
                before = len(waiting)
                self._pass_over(waiting, lambda: bar.update(shown, completed=len(missing) - len(waiting)))
                self._written(self.store.flush())
                if waiting and len(waiting) == before:  # others are at all that is left
                    time.sleep(pause)
                    pause = min(2 * pause, _POLL_SECONDS[1])
                else:
                    pause = _POLL_SECONDS[0]
        finally:
            self._leave()
        merge_packs(self.store.folder, self.claims)
        self.claims.tidy()
        return self.made

    def _pass_over(self, waiting: dict[str, CacheJob], show: Callable[[], None]) -> None:
        for job in list(waiting.values()):
            if self.stop is not None:
                self.stop()
            if self.store.has(job.key):
                del waiting[job.key]
            elif all(map(self.store.has, job.needs)) and self._claim(job.key):
                self._make_unless_bad(job)
                del waiting[job.key]
            show()
        for job in [job for job in waiting.values() if job.row in self.bad_rows]:
            # among them is what reads the output of the unit that failed
            del waiting[job.key]
        self.store.refresh()

    def _claim(self, key: str) -> bool:
        try:
            return self.claims.take(key)
        except OSError as error:
            raise cannot_write(self.store.root, error) from error

    def _make_unless_bad(self, job: CacheJob) -> None:
        try:
            self._make(job)
        except BadRowError as error:
            if not self.skip_bad or error.bad_row is None:
                raise
            self.bad_rows[job.row] = error.bad_row
            self.claims.release([job.key])

    def _make(self, job: CacheJob) -> None:
        self.store.refresh()
        if self.store.has(job.key):  # another process made it and gave its claim back before this one took it
            self.claims.release([job.key])
            return
        tensors = encode_job(self.model, self.dataset, self.plan, self.store, job)
        self.made += 1
        self._written(self.store.add(job.key, tensors, describe_unit(job.entries.unit)))

    def _written(self, keys: list[str]) -> None:
        self.claims.release(keys)
        if keys:
            merge_packs(self.store.folder, self.claims, at_least=MANY_PACKS)

    def _leave(self) -> None:
        """Keep what was made, and give back what was not, whatever ended the filling."""
        try:
            self.store.flush()
        finally:
            self.claims.release_all()


@contextmanager
def _moved_away(pipe: BasePipeline) -> Iterator[None]:
    """Keep the denoiser off the GPU while the encoders need the room."""
    denoiser = pipe.denoiser
    if denoiser is None or is_cpu(pipe.device):
        yield
        return
    denoiser.to("cpu")
    try:
        yield
    finally:
        denoiser.to(pipe.device)
