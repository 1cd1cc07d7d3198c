"""Singular values of factors and of dense changes."""

from __future__ import annotations

import pytest
import torch

from diffsynth.adapters.arithmetic import low_rank, resize_layer, sum_kept
from diffsynth.adapters.state import LoraLayer


def layer(shape: tuple[int, ...], rank: int, alpha: float = 7.0) -> LoraLayer:
    generator = torch.Generator().manual_seed(rank)
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
    return LoraLayer(torch.randn(rank, *shape[1:], generator=generator), up, alpha, rank)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40, 3, 3), (4, 40)])
def test_resized_factors_are_the_truncated_singular_values(shape):
    full = layer(shape, 6)
    small, kept = resize_layer(full, rank=3)
    u, s, vh = torch.linalg.svd(full.delta().flatten(1).double(), full_matrices=False)
    expected = (u[:, :3] * s[:3]) @ vh[:3]
    torch.testing.assert_close(small.delta().flatten(1).double(), expected, atol=1e-4, rtol=1e-4)
    assert (small.rank, small.scale, small.shape) == (3, 1.0, shape)
    assert kept.share == pytest.approx(float(s[:3].square().sum() / s.square().sum()), rel=1e-6)


def test_zero_change_and_full_share():
    empty = LoraLayer(torch.randn(4, 8), torch.zeros(8, 4), 4.0, 4)
    small, kept = resize_layer(empty, keep=0.9)
    assert (small.rank, kept.share) == (1, 1.0)
    assert not small.delta().any()
    full = layer((30, 20), 5)
    same, kept = resize_layer(full, keep=1.0)
    assert same.rank == 5
    torch.testing.assert_close(same.delta(), full.delta(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"rank": 2, "keep": 0.5}])
def test_rank_or_share_not_both(options):
    with pytest.raises(ValueError, match="either"):
        resize_layer(layer((8, 8), 4), **options)


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_large_changes_lose_next_to_nothing_to_the_randomised_method(decay):
    """Singular values that fall as slowly as those of full training: 1 / k ** decay."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(700, 600, generator=generator))[0] for _ in "lr")
    values = torch.arange(1, 601).double().pow(-decay).float()
    change = (left * values) @ right.T
    found, kept = low_rank(change, 16, "a layer")
    best = float(values[:16].square().sum() / values.square().sum())
    assert best * 0.998 <= kept.share <= best * (1 + 1e-5)
    error = float((change - found.delta()).square().sum() / change.square().sum())
    assert 1 - error == pytest.approx(kept.share, abs=1e-5)
    again, _ = low_rank(change, 16, "a layer")
    assert torch.equal(again.up, found.up)


def test_large_change_of_low_rank_is_found_exactly():
    full = layer((700, 900), 5)
    found, kept = low_rank(full.delta(), 8)
    assert kept.share == pytest.approx(1, abs=1e-6)
    error = (found.delta() - full.delta()).norm() / full.delta().norm()
    assert float(error) <= 1e-5


def test_parts_add_up():
    kept = sum_kept([resize_layer(layer((20, 20), 6), rank=2)[1], resize_layer(layer((20, 20), 5), rank=5)[1]])
    assert 0.5 < kept.share < 1
