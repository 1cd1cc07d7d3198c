"""Weight names of an original checkpoint and of our network, as a table that reads in both directions.

A table is a list of rules ``original name -> our name(s)``. ``{i}`` stands for a number and a trailing ``*`` for the
last part of the name (``weight``, ``bias``). One original tensor may hold the rows of several of ours (a fused qkv).
LoRA formats are written from the same table: what is true for a weight's rows is true for the rows of its ``lora_B``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ..core.errors import UserError


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    original: str
    ours: tuple[str, ...]
    proportions: tuple[int, ...] = (1,)
    """Share of the original's rows that belongs to each of ours, in order."""
    swap_halves: bool = False
    """The two halves of the rows stand in the other order (shift, scale against scale, shift)."""
    squeeze: bool = False
    """A 1x1 convolution (out, in, 1, 1) in the original, a linear layer (out, in) here."""
    transpose: bool = False
    """A matrix (in, out) in the original, (out, in) here."""


def rename(
    original: str, ours: str, *, swap_halves: bool = False, squeeze: bool = False, transpose: bool = False
) -> Rule:
    return Rule(original, (ours,), (1,), swap_halves, squeeze, transpose)


def split(original: str, ours: Sequence[str], proportions: Sequence[int] | None = None) -> Rule:
    return Rule(original, tuple(ours), tuple(proportions or [1] * len(ours)))


@dataclass(frozen=True)
class Match:
    """Where one of our tensors lives in the original: rows ``index`` of ``proportions`` of ``original``."""

    original: str
    ours: tuple[str, ...]
    index: int
    rule: Rule


@dataclass(frozen=True)
class KeyMap:
    rules: tuple[Rule, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    """How many numbers each placeholder takes (``{block}`` -> 19); lets ``pairs`` list every name there is."""

    def pairs(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Every (original name, our names) of a network of this size; ``*`` stands for both weight and bias."""
        for rule in self.rules:
            names = list(dict.fromkeys(re.findall(r"\{(\w+)\}", rule.original)))
            leaves = ("weight", "bias") if rule.original.endswith("*") else ("",)
            ranges = [range(self.counts[name]) for name in names]
            for numbers in itertools.product(*ranges):
                for leaf in leaves:
                    values = {**dict(zip(names, map(str, numbers), strict=True)), "leaf": leaf}
                    yield _fill(rule.original, values), tuple(_fill(ours, values) for ours in rule.ours)

    def our_names(self) -> list[str]:
        """Every name that our network of this size has."""
        return [name for _, ours in self.pairs() for name in ours]

    @cached_property
    def _patterns(self) -> tuple[list, dict[str, list]]:
        originals = [(_regex(rule.original), rule) for rule in self.rules]
        ours: dict[str, list] = {}
        for rule in self.rules:
            for index, name in enumerate(rule.ours):
                ours.setdefault(name.split(".", 1)[0], []).append((_regex(name), index, rule))
        return originals, ours

    def match_original(self, key: str) -> Match | None:
        """The rule for an original key, or None when the table does not know it."""
        for pattern, rule in self._patterns[0]:
            if found := pattern.fullmatch(key):
                values = found.groupdict()
                return Match(key, tuple(_fill(name, values) for name in rule.ours), 0, rule)
        return None

    def match_ours(self, key: str) -> Match | None:
        """Where one of our keys lives in the original, or None when the table does not know it."""
        for pattern, index, rule in self._patterns[1].get(key.split(".", 1)[0], ()):
            if found := pattern.fullmatch(key):
                values = found.groupdict()
                ours = tuple(_fill(name, values) for name in rule.ours)
                return Match(_fill(rule.original, values), ours, index, rule)
        return None

    def to_ours(self, original: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert a whole state dict; unknown keys are an error."""
        converted: dict[str, torch.Tensor] = {}
        for key, tensor in original.items():
            match = self.match_original(key)
            if match is None:
                raise UserError(f"weight {key!r} is not part of this layout.")
            converted.update(zip(match.ours, to_ours(match.rule, tensor), strict=True))
        return converted

    def to_original(self, ours: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of ``to_ours``."""
        converted: dict[str, torch.Tensor] = {}
        for key in ours:
            match = self.match_ours(key)
            if match is None:
                raise UserError(f"weight {key!r} has no name in the original layout.")
            if match.original not in converted:
                converted[match.original] = to_original(match.rule, [ours[name] for name in match.ours])
        return converted


def to_ours(rule: Rule, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The rows of one original tensor as the tensors they become here."""
    if rule.squeeze and tensor.ndim == 4:
        tensor = tensor[:, :, 0, 0]
    if rule.transpose:
        tensor = tensor.t()
    if rule.swap_halves:
        first, second = tensor.chunk(2, dim=0)
        tensor = torch.cat([second, first], dim=0)
    return [tensor] if len(rule.ours) == 1 else list(tensor.split(row_counts(rule, tensor.shape[0]), dim=0))


def to_original(rule: Rule, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    tensor = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=0)
    if rule.swap_halves:
        first, second = tensor.chunk(2, dim=0)
        tensor = torch.cat([second, first], dim=0)
    if rule.squeeze and tensor.ndim == 2:
        tensor = tensor[:, :, None, None]
    return tensor.t() if rule.transpose else tensor


def row_counts(rule: Rule, rows: int) -> list[int]:
    """How many of the original's rows go to each of ours."""
    total = sum(rule.proportions)
    if rows % total:
        raise UserError(f"{rule.original}: {rows} rows cannot be divided in the proportions {rule.proportions}.")
    return [rows // total * share for share in rule.proportions]


def shapes_to_ours(rule: Rule, shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of our tensors from the shape of the original one."""
    if rule.transpose:
        return [tuple(reversed(shape))]
    rest = tuple(shape[1:2]) if rule.squeeze and len(shape) == 4 else tuple(shape[1:])
    if len(rule.ours) == 1:
        return [(*shape[:1], *rest)]
    return [(rows, *rest) for rows in row_counts(rule, shape[0])]


def _regex(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(r"\{", "{").replace(r"\}", "}")
    seen: set[str] = set()

    def group(found: re.Match[str]) -> str:
        name = found[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return rf"(?P<{name}>\d+)"

    escaped = re.sub(r"\{(\w+)\}", group, escaped)
    return re.compile(re.sub(r"\\\*$", r"(?P<leaf>[^.]+)", escaped))


def _fill(pattern: str, values: Mapping[str, str]) -> str:
    filled = re.sub(r"\{(\w+)\}", lambda found: values[found[1]], pattern)
    return filled[:-1] + values["leaf"] if filled.endswith("*") else filled
