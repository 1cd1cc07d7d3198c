"""Low-rank changes made smaller, added up, and found in dense ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..core.device import has_float64
from ..core.random import keyed_generator
from .state import LoraLayer

EXACT_SIZE = 512
"""Up to this many rows or columns the singular values are computed exactly."""
OVERSAMPLING = 16
POWER_ITERATIONS = 4


@dataclass(frozen=True)
class Kept:
    """How much of a change survived, in squared Frobenius norm."""

    total: float
    kept: float

    @property
    def share(self) -> float:
        return self.kept / self.total if self.total > 0 else 1.0


def sum_kept(parts: Iterable[Kept]) -> Kept:
    """Several layers as one."""
    listed = list(parts)
    return Kept(math.fsum(part.total for part in listed), math.fsum(part.kept for part in listed))


def resize_layer(layer: LoraLayer, rank: int | None = None, keep: float | None = None) -> tuple[LoraLayer, Kept]:
    """The nearest change of lower rank; its scale is 1.

    The full matrix is never formed: both factors are brought to triangular form, and the singular values of
    ``R_up @ R_down.T`` are those of ``up @ down``.

    Args:
        rank: The new rank; a layer of lower rank keeps its own.
        keep: Instead: the lowest rank that keeps this share of the squared norm, above 0 and at most 1.
    Raises:
        ValueError: neither or both of ``rank`` and ``keep`` are given.
    """
    if (rank is None) == (keep is None):
        raise ValueError("give either rank or keep.")
    up = layer.up.detach().to("cpu", torch.float64).flatten(1) * layer.scale
    down = layer.down.detach().to("cpu", torch.float64).flatten(1)
    left, left_triangle = torch.linalg.qr(up)
    right, right_triangle = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(left_triangle @ right_triangle.T, full_matrices=False)
    energy = s.square()
    if rank is None:
        rank = _rank_that_keeps(energy, keep or 0.0)
    rank = min(rank, len(s))
    resized = _layer(left @ u[:, :rank], s[:rank], (right @ vh[:rank].T).T, layer.shape)
    return resized, Kept(float(energy.sum()), float(energy[:rank].sum()))


def low_rank(change: torch.Tensor, rank: int, seed_name: str = "") -> tuple[LoraLayer, Kept]:
    """The nearest change of this rank to a dense one, by its singular values; its scale is 1.

    Large matrices go through a randomised range finder with power iterations: what it keeps is reported exactly, and
    is less than the best possible by under a tenth of a percent of the norm for spectra that fall at all.

    Args:
        change: (out, in) or (out, in, kh, kw), on the device where the work is to be done.
        rank: At most this; a smaller matrix has less.
        seed_name: What the random start depends on, so that equal input gives equal output.
    Source: Halko, Martinsson and Tropp 2011, arXiv:0909.4061.
    """
    matrix = change.detach().flatten(1)
    widest = torch.float64 if has_float64(matrix.device) else torch.float32
    total = float(matrix.to(widest).square().sum())
    size = min(matrix.shape)
    rank = min(rank, size)
    if size <= max(EXACT_SIZE, 2 * (rank + OVERSAMPLING)):
        u, s, vh = torch.linalg.svd(matrix.to(widest), full_matrices=False)
    else:
        u, s, vh = _randomised_svd(matrix.to(torch.float32), rank + OVERSAMPLING, seed_name)
    kept = min(total, float(s[:rank].to(widest).square().sum()))
    return _layer(u[:, :rank], s[:rank], vh[:rank], tuple(change.shape)), Kept(total, kept)


def weighted_sum(layers: Sequence[tuple[LoraLayer, float]]) -> LoraLayer:
    """The sum of several changes of one weight, exactly: the ranks add up; its scale is 1.

    Args:
        layers: Each with the factor of its change.
    """
    scaled = [(layer.up.detach().to("cpu", torch.float64) * (layer.scale * weight)).to(torch.float32)
              for layer, weight in layers]
    down = torch.cat([layer.down.detach().to("cpu", torch.float32) for layer, _ in layers])
    return LoraLayer(down, torch.cat(scaled, dim=1), float(down.shape[0]), down.shape[0])


def _rank_that_keeps(energy: torch.Tensor, share: float) -> int:
    total = float(energy.sum())
    if total == 0:
        return 1
    kept = torch.cumsum(energy, 0) / total
    # the last sum may round to just below 1
    return min(len(energy), 1 + int((kept < min(share, 1 - 1e-12)).sum()))


def _randomised_svd(
    matrix: torch.Tensor, size: int, seed_name: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    start = torch.randn(matrix.shape[1], size, generator=keyed_generator(0, "randomised_svd", seed_name))
    basis = torch.linalg.qr(matrix @ start.to(matrix))[0]
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ basis)[0]
        basis = torch.linalg.qr(matrix @ basis)[0]
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vh


def _layer(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, shape: tuple[int, ...]) -> LoraLayer:
    # half of each singular value on either side keeps both factors in the range of narrow dtypes
    root = s.sqrt()
    rank = len(s)
    up = (u * root).to("cpu", torch.float32).reshape(shape[0], rank, *[1] * (len(shape) - 2)).contiguous()
    down = (root[:, None] * vh).to("cpu", torch.float32).reshape(rank, *shape[1:]).contiguous()
    return LoraLayer(down, up, float(rank), rank)
