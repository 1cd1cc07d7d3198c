"""The one place that draws random numbers for training.

Draws are keyed, not streamed: the number an item sees depends on (seed, epoch, item, purpose) alone, never on rank,
world size, worker count, batch split or on what was drawn before. Inside ``keyed_items`` the functions ``normal`` and
``uniform`` give every row of a batch the numbers of its own item; outside, they use torch's global generator, so that
a hand-written script behaves like any other torch program.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class _Draw:
    seed: int
    epoch: int
    items: tuple[int, ...]


_CURRENT: ContextVar[_Draw | None] = ContextVar("diffsynth_keyed_items", default=None)


def keyed_seed(seed: int, *key: int | str) -> int:
    """A 63-bit seed that depends on every part of the key; stable across platforms and versions."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in (seed, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator of its own for one (seed, key)."""
    return torch.Generator("cpu").manual_seed(keyed_seed(seed, *key))


@contextmanager
def keyed_items(seed: int, epoch: int, items: Sequence[int]) -> Iterator[None]:
    """Within this block, row ``b`` of every draw belongs to ``items[b]`` of this epoch."""
    token = _CURRENT.set(_Draw(seed, epoch, tuple(items)))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_items() -> tuple[int, ...]:
    """The items of the enclosing ``keyed_items`` block, empty outside of one."""
    draw = _CURRENT.get()
    return () if draw is None else draw.items


def normal(shape: Sequence[int], purpose: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard normal numbers, float32, (B, ...), keyed by item inside ``keyed_items``."""
    return _draw(torch.randn, shape, purpose).to(device)


def uniform(shape: Sequence[int], purpose: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniform numbers in [0, 1), float32, (B, ...), keyed by item inside ``keyed_items``."""
    return _draw(torch.rand, shape, purpose).to(device)


def _draw(sampler, shape: Sequence[int], purpose: str) -> torch.Tensor:
    draw = _CURRENT.get()
    if draw is None:
        return sampler(tuple(shape))
    if shape[0] != len(draw.items):
        raise ValueError(f"{purpose}: asked for {shape[0]} rows, but the batch holds {len(draw.items)} items.")
    rows = [
        sampler(tuple(shape[1:]), generator=keyed_generator(draw.seed, draw.epoch, item, purpose))
        for item in draw.items
    ]
    return torch.stack(rows)
