"""``diffsynth inspect``: what is in a checkpoint, a LoRA file or a data set, without loading any of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UserError, printable

if TYPE_CHECKING:
    from rich.table import Table

    from ..core.data import UnifiedDataset

WEIGHT_SUFFIXES = (".safetensors", ".sft", ".bin", ".pt", ".pth", ".ckpt")
METADATA_SUFFIXES = (".csv", ".json", ".jsonl")
_LORA_KEY = re.compile(r"[._]lora[._](A|B|down|up)\b|\.hada_w1_a|\.lokr_w1")
_FORMATS = (("lora_unet_", "kohya"), ("lora_te", "kohya"), ("diffusion_model.", "comfyui"),
            ("transformer.", "diffusers"), ("unet.", "diffusers"), ("text_encoder", "diffusers"))
_EXAMPLES = 5


def inspect(paths: Sequence[str]) -> dict[str, Any]:
    """Say what some files hold.

    Args:
        paths: A weight file, the shards of one network, a model folder, a LoRA file, or a data set.
    Returns:
        A description of plain values: ``components`` for networks, ``lora`` or ``dataset`` for the others.
    Raises:
        UserError: a path does not exist, or nothing known is in it.
    """
    listed = [Path(path) for path in paths]
    for path in listed:
        if not path.exists():
            raise UserError(f"there is no file or folder {path}.")
    first = listed[0]
    if first.suffix in METADATA_SUFFIXES and first.is_file() and len(listed) == 1:
        return {"dataset": inspect_dataset(first.parent, first)}
    if first.is_dir() and len(listed) == 1 and not _weight_files(first):
        return {"dataset": inspect_dataset(first, None)}
    if len(listed) == 1 and first.is_file() and is_lora(first):
        return {"lora": inspect_lora(first)}
    from ..models.inspection import inspect_files

    return inspect_files(listed)


def _weight_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in WEIGHT_SUFFIXES]


def is_lora(path: Path) -> bool:
    """Whether a weight file holds an adapter, by the names of its tensors."""
    from ..core.loader import WeightReader

    with WeightReader(path) as reader:
        return any(_LORA_KEY.search(key) for key in reader.tensors)


def inspect_lora(path: Path) -> dict[str, Any]:
    """Family, format, rank, alpha, layers and base of a LoRA file.

    Raises:
        UserError: it belongs to no known family; the reason of each is given.
    """
    from ..adapters.files import load_lora_file
    from ..core.loader import WeightReader
    from ..models.registry import all_families

    with WeightReader(path) as reader:
        metadata, keys = dict(reader.metadata), list(reader.tensors)
    reasons = []
    for family in all_families():
        try:
            states = load_lora_file(path, family)
        except UserError as error:
            reasons.append(str(error))
            continue
        layers = [layer for state in states.values() for layer in state.layers.values()]
        return {
            "path": str(path),
            "family": family.name,
            "format": metadata.get("lora_format") or _format_of(keys),
            "base": metadata.get("base") or metadata.get("ss_base_model_version"),
            "rank": _common([layer.rank for layer in layers]),
            "alpha": _common([layer.alpha for layer in layers]),
            "rslora": any(layer.use_rslora for layer in layers),
            "dora": any(layer.dora_scale is not None for layer in layers),
            "components": {name: sorted(state.layers) for name, state in states.items()},
            "num_layers": len(layers),
            "num_parameters": sum(layer.down.numel() + layer.up.numel() for layer in layers),
            "metadata": metadata,
        }
    raise UserError(" ".join(reasons))


def _format_of(keys: Sequence[str]) -> str:
    return next((name for prefix, name in _FORMATS if keys and keys[0].startswith(prefix)), "diffsynth")


def _common(values: Sequence[float]) -> Any:
    """The value that all layers share, else the different ones in order."""
    distinct = sorted(set(values))
    return distinct[0] if len(distinct) == 1 else distinct


def inspect_dataset(folder: Path, metadata: Path | None) -> dict[str, Any]:
    """Rows, columns, picture sizes, captions and problems of a data set; every file's header is read."""
    from ..core.data import UnifiedDataset

    table = UnifiedDataset(folder, metadata)
    columns = list(table.rows.table.columns)
    keys = tuple(key for key in ("image", "video") if key in columns)
    dataset = UnifiedDataset(folder, metadata, data_file_keys=keys,
                             main_data_operator=UnifiedDataset.default_image_operator(
                                 str(folder), height_division_factor=1, width_division_factor=1))
    sizes, problems = _sizes_and_problems(dataset) if "image" in keys else (Counter(), [])
    captions = [str(table.row(item).get("prompt", "")) for item in range(table.num_rows)]
    found = dataset.rows.table.problems.items()
    problems += [f"{dataset.rows.place(number, key)}: {reason}" for number, (key, reason) in found]
    if "prompt" not in columns:
        problems.append(f"{dataset.metadata_path} has no column 'prompt' (or 'text').")
    return {
        "path": str(dataset.metadata_path),
        "rows": dataset.num_rows,
        "columns": columns,
        "sizes": {f"{width}x{height}": count for (height, width), count in sizes.most_common()},
        "captions": {
            "distinct": len(set(captions)),
            "empty": sum(not caption.strip() for caption in captions),
            "longest": max(map(len, captions), default=0),
            "examples": list(dict.fromkeys(captions))[:_EXAMPLES],
        },
        "problems": problems,
    }


def _sizes_and_problems(dataset: UnifiedDataset) -> tuple[Counter[tuple[int, int]], list[str]]:
    sizes: Counter[tuple[int, int]] = Counter()
    problems = []
    for item in range(dataset.num_rows):
        try:
            if (bucket := dataset.bucket(item)) is not None:
                sizes[bucket] += 1
        except UserError as error:
            problems.append(str(error))
    return sizes, problems


def write_tables(found: Mapping[str, Any]) -> None:
    """Show what ``inspect`` found on stdout."""
    from rich.console import Console

    console = Console(markup=False)
    if "components" in found:
        for component in found["components"]:
            console.print(_component_table(component))
        return
    kind, values = next(iter(found.items()))
    shown = dict(values)
    if kind == "lora":
        shown.pop("metadata")
        shown["components"] = {name: f"{len(layers)} layers, such as {', '.join(layers[:3])}"
                               for name, layers in values["components"].items()}
    console.print(_two_columns("Data set" if kind == "dataset" else "LoRA", shown))


def _component_table(component: Mapping[str, Any]) -> Table:
    shown = {key: value for key, value in component.items() if key not in ("name", "missing", "unexpected")}
    shown["num_parameters"] = f"{component['num_parameters']:,}"
    for key in ("missing", "unexpected"):
        names = component[key]
        shown[key] = f"{len(names)}: {', '.join(names[:_EXAMPLES])}" if names else "none"
    return _two_columns(str(component["name"]), shown)


def _two_columns(title: str, values: Mapping[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in values.items():
        table.add_row(key.replace("_", " "), Text(_readable(value)))
    return table


def _readable(value: Any) -> str:
    if isinstance(value, Mapping):
        return "\n".join(f"{printable(str(key))}: {_readable(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        separator = ", " if all(isinstance(item, int | float) for item in value) else "\n"
        return separator.join(printable(str(item)) for item in value)
    return printable(str(value))
