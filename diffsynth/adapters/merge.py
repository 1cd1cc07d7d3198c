"""LoRA files added into a model file, weight by weight: the same names, layout and dtype come out."""

from __future__ import annotations

import json
import logging
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..core.errors import UserError
from ..core.loader import TensorInfo, WeightReader
from ..core.loader.writer import new_folder, replace_file, stream_safetensors
from ..models.keymap import Match, to_original, to_ours
from ..models.recognition import assign_weights, find_components
from .base_weights import BaseFile, config_beside
from .files import LoraFile
from .fused import weight_change
from .state import LoraLayer

logger = logging.getLogger(__name__)

_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")

Progress = Callable[[Sequence[str]], Iterable[str]]


@dataclass
class Merged:
    """What a merge did."""

    files: list[Path]
    num_layers: int
    """Layers of all LoRA files together; each has been added."""
    num_weights: int
    """Weights of the file that are different now."""
    num_bytes: int
    norms: dict[str, float] = field(default_factory=dict)
    """Our weight -> norm of its change by norm of the weight."""


class Merge:
    """Several LoRA files, each with a strength, on one model file.

    Args:
        base: The model file; must hold every network that the LoRAs change.
        loras: LoRA file and strength, in the order in which the changes are summed.
        dtype: Dtype of the weights that are written; None keeps that of each.
    Raises:
        UserError: a layer does not exist in the model or has another shape there, or the model is in float8 and no
            wider dtype is asked for.
    """

    def __init__(
        self, base: BaseFile, loras: Sequence[tuple[LoraFile, float]], dtype: torch.dtype | None = None
    ) -> None:
        self.base, self.loras = base, list(loras)
        self.changes = _changes(base, self.loras)
        self.infos = {key: TensorInfo(info.shape, dtype if dtype and info.dtype.is_floating_point else info.dtype)
                      for key, info in base.reader.tensors.items()}
        coarse = [key for key in self.changes if self.infos[key].dtype.itemsize == 1]
        if coarse:
            raise UserError(f"{base.describe()} keeps its weights in float8 ({coarse[0]!r}), whose steps are larger "
                            "than most changes of a LoRA: merge into the model in 16 bits, or give --dtype bfloat16.")
        self.done = Merged([], sum(len(state.layers) for file, _ in loras for state in file.states.values()),
                           len(self.changes), 0)
        self._checksums: dict[str, int] = {}

    def write(self, path: Path, max_shard_bytes: int, progress: Progress = iter) -> Merged:
        """Write the merged model: one file where ``path`` ends in ``.safetensors``, else a folder, in shards.

        Nothing is at ``path`` before everything was read back and found to be what was meant.
        """
        if path.suffix == ".safetensors":
            self._write_file(path, list(self.infos), progress, path)
            self.done.files = [path]
        else:
            with new_folder(path) as folder:
                names = self._write_folder(folder, max_shard_bytes, progress)
                self._check_loads([folder / name for name in names])
            self.done.files = [path / name for name in names]
        return self.done

    def _write_folder(self, folder: Path, max_shard_bytes: int, progress: Progress) -> list[str]:
        stem = self.base.stem
        shards = _shards(self.infos, max_shard_bytes)
        names = [f"{stem}-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
        if len(shards) == 1:
            names = [f"{stem}.safetensors"]
        for name, keys in zip(names, shards, strict=True):
            self._write_file(folder / name, keys, progress, None)
        if len(shards) > 1:
            placed = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
            index = {"metadata": {"total_size": self.done.num_bytes}, "weight_map": dict(sorted(placed.items()))}
            _write_json(folder / f"{stem}.safetensors.index.json", index)
        config = config_beside(self.base)
        if config is None and len(self.base.networks) == 1:
            config = self.base.networks[0].config
        if config is not None:
            _write_json(folder / "config.json", config)
        return names

    def _write_file(self, path: Path, keys: list[str], progress: Progress, whole: Path | None) -> None:
        infos = {key: self.infos[key] for key in keys}
        shown = iter(progress(keys))

        def make(key: str) -> torch.Tensor:
            next(shown, None)
            tensor = self.weight(key)
            self._checksums[key] = _checksum(tensor)
            self.done.num_bytes += tensor.numel() * tensor.dtype.itemsize
            return tensor

        def check(written: Path) -> None:
            self._check_bytes(written, keys)
            if whole is not None:
                self._check_loads([written])

        stream_safetensors(path, infos, make, self._metadata(), check)
        next(shown, None)

    def weight(self, key: str) -> torch.Tensor:
        """One weight of the merged file: all changes are summed in float32 and rounded once."""
        original = self.base.reader.get(key)
        dtype = self.infos[key].dtype
        tensor = original if key not in self.changes else self._changed(key, original)
        cast = tensor.to(dtype)
        if cast is not original and cast.numel() and not bool(torch.stack(torch.aminmax(cast)).isfinite().all()):
            raise UserError(f"the merged weight {key!r} is not finite in {str(dtype).removeprefix('torch.')}; "
                            "give --dtype bfloat16 or float32, or a lower strength.")
        return cast

    def _changed(self, key: str, original: torch.Tensor) -> torch.Tensor:
        match, changes = self.changes[key]
        parts = to_ours(match.rule, original.to(torch.float32))
        merged = []
        for name, part in zip(match.ours, parts, strict=True):
            change = torch.zeros_like(part)
            for layer, strength in changes.get(name, ()):
                change += weight_change(layer, part, strength)
            self.done.norms[name] = float(change.norm() / part.norm().clamp_min(1e-30))
            merged.append(part + change)
        return to_original(match.rule, merged).reshape(original.shape)

    def _metadata(self) -> dict[str, str]:
        """Metadata of the base, its configuration where the file can hold one, and what was merged."""
        metadata = {key: value for key, value in self.base.reader.metadata.items() if key not in _HASHES}
        networks = self.base.networks
        if "config" not in metadata and len(networks) == 1 and networks[0].found.prefix == "":
            metadata["config"] = json.dumps(networks[0].config, sort_keys=True, default=str)
        merged = json.loads(metadata.get("merged_loras", "[]"))
        merged += [{"file": file.path.name, "strength": strength} for file, strength in self.loras]
        return {**metadata, "merged_loras": json.dumps(merged, ensure_ascii=False)}

    def _check_bytes(self, path: Path, keys: Sequence[str]) -> None:
        with WeightReader(path) as reader:
            for key in keys:
                if reader.tensors[key] != self.infos[key] or _checksum(reader.get(key)) != self._checksums[key]:
                    raise RuntimeError(f"weight {key!r} of the merged file reads back differently; it was not kept.")

    def _check_loads(self, paths: Sequence[Path]) -> None:
        """The same networks, complete, are found in what was written."""
        with WeightReader(paths) as reader:
            found = find_components(reader, [network.found.spec for network in self.base.networks])
            assign_weights(reader.tensors, found, [part.expected_names() for part in found])
            missing = [name for part in found for name in part.missing]
            meant = [(n.found.spec.kind, n.found.layout.name, n.found.prefix) for n in self.base.networks]
            if missing or [(part.spec.kind, part.layout.name, part.prefix) for part in found] != meant:
                raise RuntimeError(f"the merged file is not recognised as what it was made from: it holds "
                                   f"{[part.spec.kind for part in found]}, missing are {missing[:3]}.")


def _changes(
    base: BaseFile, loras: Sequence[tuple[LoraFile, float]]
) -> dict[str, tuple[Match, dict[str, list[tuple[LoraLayer, float]]]]]:
    """Key in the base file -> its place, and for each of our weights in it the layers that change it."""
    changes: dict[str, tuple[Match, dict[str, list[tuple[LoraLayer, float]]]]] = {}
    networks = {network.component: network for network in base.networks}
    for file, strength in loras:
        if not math.isfinite(strength):
            raise UserError(f"the strength of {file.path} must be a finite number, got {strength}.")
        for component, state in file.states.items():
            network = networks[component]
            for module, layer in state.layers.items():
                name = f"{module}.weight"
                if name not in network.places:
                    raise UserError(f"LoRA file {file.path}: layer {module!r} does not exist in {base.describe()}; the "
                                    "LoRA is of a larger or another model.")
                if network.shape(name) != layer.shape:
                    raise UserError(f"LoRA file {file.path}: layer {module!r} changes a weight of shape {layer.shape}, "
                                    f"and in {base.describe()} it has {network.shape(name)}; the LoRA is of another "
                                    "model.")
                key, match = network.places[name]
                changes.setdefault(key, (match, {}))[1].setdefault(name, []).append((layer, strength))
    return changes


def _shards(infos: Mapping[str, TensorInfo], max_bytes: int) -> list[list[str]]:
    """Weights in their order, cut so that no shard is larger; a weight that is larger alone has a shard of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, (shape, dtype) in infos.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += num_bytes
    return shards


def _checksum(tensor: torch.Tensor) -> int:
    flat = tensor.detach().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def _write_json(path: Path, value: object) -> None:
    with replace_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode("utf-8"))
