"""What a LoRA is, apart from any network and any file: two factors and a scale for each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..models.keymap import Match, to_original, to_ours


@dataclass(frozen=True)
class LoraLayer:
    """The change of one layer: ``scale * up @ down``."""

    down: torch.Tensor
    """(rank, in) or (rank, in, kh, kw)."""
    up: torch.Tensor
    """(out, rank) or (out, rank, 1, 1)."""
    alpha: float
    rank: int
    use_rslora: bool = False
    dora_scale: torch.Tensor | None = None
    """Trained norm of each output row, (out,), where the layer is a DoRA."""

    @property
    def scale(self) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def plain_alpha(self) -> float:
        """The alpha that gives the same scale without rsLoRA."""
        return self.scale * self.rank if self.use_rslora else self.alpha

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that is changed."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self, device: torch.device | str | None = None) -> torch.Tensor:
        """The plain LoRA change, in float32 and in the shape of the weight."""
        up = self.up.to(device, torch.float32).flatten(1)
        down = self.down.to(device, torch.float32).flatten(1)
        return (self.scale * (up @ down)).reshape(self.shape)

    def folded(self) -> LoraLayer:
        """The same change with scale 1: the scale moves into ``up``."""
        if self.scale == 1.0:
            return replace(self, alpha=float(self.rank), use_rslora=False)
        up = (self.up.to(torch.float64) * self.scale).to(torch.float32)
        return replace(self, up=up, alpha=float(self.rank), use_rslora=False)


@dataclass
class LoraState:
    """The adapter of one network."""

    layers: dict[str, LoraLayer]
    """Module name in our network -> its change."""
    metadata: dict[str, str] = field(default_factory=dict)
    """What the file said of it: rank, alpha, base, options."""
    component: str = "dit"

    @property
    def rank(self) -> int:
        """The rank that most layers have."""
        ranks = [layer.rank for layer in self.layers.values()]
        return max(set(ranks), key=lambda rank: (ranks.count(rank), rank))


def same_change(first: LoraLayer, second: LoraLayer, tolerance: float = 1e-6) -> bool:
    """Whether two layers change the weight equally, relative to the size of the factors.

    The Frobenius norm of the difference, which bounds its largest element, is computed from the factors: the dense
    products of a large network would take minutes.
    """
    if first.shape != second.shape or (first.dora_scale is None) != (second.dora_scale is None):
        return False
    if first.dora_scale is not None and second.dora_scale is not None:
        norms = (first.dora_scale.flatten(), second.dora_scale.flatten())
        if norms[0].shape != norms[1].shape or not torch.allclose(*norms, rtol=tolerance, atol=0):
            return False
    if first.scale == second.scale and torch.equal(first.up, second.up) and torch.equal(first.down, second.down):
        return True
    ups = [layer.up.detach().to("cpu", torch.float64).flatten(1) * layer.scale for layer in (first, second)]
    downs = [layer.down.detach().to("cpu", torch.float64).flatten(1) for layer in (first, second)]
    size = max(float(ups[0].norm() * downs[0].norm()), float(ups[1].norm() * downs[1].norm()))
    if downs[0].shape == downs[1].shape and torch.equal(downs[0], downs[1]):
        return float((ups[0] - ups[1]).norm() * downs[0].norm()) <= tolerance * size
    up = torch.cat([ups[0], -ups[1]], dim=1)
    down = torch.cat([downs[0], downs[1]], dim=0)
    squared = ((up.T @ up) * (down @ down.T)).sum().clamp_min(0)  # the trace of two small Gram matrices
    return math.sqrt(float(squared)) <= tolerance * size


def fuse(match: Match, layers: Sequence[LoraLayer | None]) -> LoraLayer:
    """One layer for a weight that holds the rows of several of ours; None where a part has no adapter.

    Different ``down`` factors stack up, ``up`` becomes block-diagonal, and the rank and alpha are the sums.
    """
    rule = match.rule
    present = [layer for layer in layers if layer is not None]
    first = present[0]
    if len(layers) == 1:
        return replace(first, down=_squeeze(first.down, rule.squeeze), up=to_original(rule, [first.up]),
                       alpha=first.plain_alpha, use_rslora=False)
    same_scale = _same_scale(present)
    if share_down(layers):
        return replace(first, up=to_original(rule, [layer.up for layer in present]), alpha=first.plain_alpha,
                       use_rslora=False)
    if not same_scale:
        present = [layer.folded() for layer in present]
        layers = [None if layer is None else layer.folded() for layer in layers]
    rank = sum(layer.rank for layer in present)
    share = next(rule.proportions[index] for index, layer in enumerate(layers) if layer is not None)
    unit_rows = present[0].up.shape[0] // share
    blocks, column = [], 0
    for layer, proportion in zip(layers, rule.proportions, strict=True):
        block = first.up.new_zeros(unit_rows * proportion, rank, dtype=torch.float32)
        if layer is not None:
            block[:, column : column + layer.rank] = layer.up
            column += layer.rank
        blocks.append(block)
    down = torch.cat([layer.down.to(torch.float32) for layer in present])
    return LoraLayer(down, to_original(rule, blocks), sum(layer.plain_alpha for layer in present), rank)


def share_down(layers: Sequence[LoraLayer | None]) -> bool:
    """Whether all are there, with one scale and one ``down`` factor: the rows of a fused layer."""
    present = [layer for layer in layers if layer is not None]
    return (len(present) == len(layers) and _same_scale(present)
            and all(_equal(layer.down, present[0].down) for layer in present))


def _same_scale(layers: Sequence[LoraLayer]) -> bool:
    return all(math.isclose(layer.scale, layers[0].scale, rel_tol=1e-12) for layer in layers)


def unfuse(match: Match, layer: LoraLayer) -> dict[str, LoraLayer]:
    """The parts of a layer that belong to ours; a block-diagonal ``up`` gives back the parts it was made of."""
    rule = match.rule
    ups = to_ours(rule, layer.up)
    down = layer.down[:, :, 0, 0] if rule.squeeze and layer.down.ndim == 4 else layer.down
    if len(ups) == 1:
        return {match.ours[0]: replace(layer, down=down, up=ups[0])}
    parts: dict[str, LoraLayer] = {}
    columns = _columns_of_parts(ups, layer.rank)
    for name, up, used in zip(match.ours, ups, columns, strict=True):
        if used is None:
            # copies: safetensors refuses to write tensors that share their storage
            parts[name] = replace(layer, down=down.clone(), up=up.clone())
        elif len(used):
            index = torch.tensor(used)
            rank = len(used)
            parts[name] = LoraLayer(down[index].clone(), up[:, index].clone(),
                                    layer.plain_alpha * rank / layer.rank, rank)
    return parts


def _columns_of_parts(ups: Sequence[torch.Tensor], rank: int) -> Sequence[list[int] | None]:
    """Which columns of the fused ``up`` each part uses; None for every part when they share columns."""
    used = [up.flatten(1).abs().sum(dim=0).nonzero().flatten().tolist() for up in ups]
    share = rank // len(ups)
    if rank % len(ups) == 0:
        equal = [list(range(index * share, (index + 1) * share)) for index in range(len(ups))]
        if all(set(columns) <= set(own) for columns, own in zip(used, equal, strict=True)):
            return equal
    disjoint = sum(map(len, used)) == len(set().union(*used))
    return used if disjoint and any(used) else [None] * len(ups)


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    # the first row tells most pairs apart
    return first.shape == second.shape and torch.equal(first[:1], second[:1]) and torch.equal(first, second)


def _squeeze(down: torch.Tensor, is_convolution: bool) -> torch.Tensor:
    return down[:, :, None, None] if is_convolution and down.ndim == 2 else down


def one_value(values: Iterable[float]) -> str:
    """The value that all have, or ``Dynamic`` as kohya calls a mixture."""
    different = set(values)
    return number_text(different.pop()) if len(different) == 1 else "Dynamic"


def number_text(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(float(value))
