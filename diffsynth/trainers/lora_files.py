"""``diffsynth lora``: LoRA files merged into a model, taken from one, made smaller, added up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..adapters.arithmetic import Kept, sum_kept
from ..adapters.base_weights import base_file_with, open_base, recognise_base
from ..adapters.combine import resize_states, sum_states
from ..adapters.extract import extract_lora
from ..adapters.files import (
    PICKLE_SUFFIXES,
    LoraFile,
    change_difference,
    read_lora_file,
    recognise_lora_file,
    save_lora,
)
from ..adapters.formats import FORMATS, resolve_format, unnamed_layers
from ..adapters.merge import Merge
from ..adapters.state import LoraState
from ..core.device import choose_device
from ..core.errors import UserError
from ..models.registry import get_family
from ..models.spec import ModelFamily
from .generate import parse_lora
from .lora_options import AverageLoraConfig, ExtractLoraConfig, MergeLoraConfig, ResizeLoraConfig


def merge_lora(config: MergeLoraConfig) -> Path:
    """Add LoRA files into a model file.

    Returns:
        The file or folder written.
    Raises:
        UserError: a layer does not exist in the model, or the output exists.
    """
    output, base_path = Path(config.output), Path(config.base)
    entries = [parse_lora(entry) for entry in config.lora]
    if output.suffix in PICKLE_SUFFIXES:
        raise UserError(f"{output}: merged models are written as safetensors; call it {output.stem}.safetensors, or "
                        "give the name of a new folder.")
    if output.suffix == ".safetensors":
        check_output(output, [path for path, _ in entries], config.overwrite)
    first = recognise_lora_file(entries[0][0], config.family)
    files = [first, *(read_lora_file(path, first.family) for path, _ in entries[1:])]
    loras = [(_only(file, config.components), strength) for file, (_, strength) in zip(files, entries, strict=True)]
    components = list(dict.fromkeys(name for file, _ in loras for name in file.states))
    with ExitStack() as stack:
        opened = open_base(base_path, first.family, stack)
        base = base_file_with(opened, components, base_path)
        elsewhere = [network.component for file in opened if file is not base for network in file.networks]
        if any(path.resolve() == output.resolve() for path in base.reader.paths):
            raise UserError(f"{output} is the base model itself; choose another output.")
        merge = Merge(base, loras, getattr(torch, config.dtype) if config.dtype else None)
        done = merge.write(output, config.max_shard_bytes, partial(_progress, "merging"))
        largest = sorted(done.norms, key=done.norms.__getitem__, reverse=True)[:3]
        write_table("Merged", {
            "into": f"{base.describe()} ({', '.join(n.component for n in base.networks)})",
            "LoRA files": "\n".join(f"{file.path.name}: strength {strength:g}, matched {file.num_matched} of "
                                    f"{file.num_modules} modules" for file, strength in loras),
            "layers": f"{done.num_layers} of {done.num_layers} merged, in {done.num_weights} weights",
            "largest changes": "\n".join(f"{name}: {done.norms[name]:.1%} of its norm" for name in largest),
            "written": "\n".join(map(str, done.files)),
            "not copied": f"{', '.join(elsewhere)}, which stay as they are" if elsewhere else "nothing",
            "size": f"{done.num_bytes / 1e9:.2f} GB, read back and compared",
        })
    return output


def extract(config: ExtractLoraConfig) -> Path:
    """Write a LoRA of the difference of two models.

    Returns:
        The file written.
    Raises:
        UserError: the models differ in shape, or where no LoRA can change them.
    """
    output = Path(config.output)
    check_output(output, [Path(config.base), Path(config.tuned)], config.overwrite)
    family = _family_of_base(Path(config.base), config.family)
    fmt = resolve_format(config.format, family)
    with ExitStack() as stack:
        base, tuned = (open_base(path, family, stack) for path in (config.base, config.tuned))
        found = extract_lora(base, tuned, family, fmt, config.rank, config.ignore_other_changes,
                             choose_device(config.device), partial(_progress, "extracting"))
        names = ", ".join(path.name for file in base for path in file.reader.paths)
    written, _ = write_lora(output, found.states, family, fmt, config.dtype, {"base": names},
                            f"extracted at rank {config.rank} from {Path(config.tuned).name}")
    _write_kept(found.kept)
    write_table("Extracted", {
        "written": f"{output} ({fmt})", **describe_lora(written), "kept": _describe_kept(found.kept),
        "equal": f"{found.num_equal} layers without a difference, left out",
        "left out": f"{len(found.others)} other weights that differ" if found.others else "nothing",
    })
    return output


def resize(config: ResizeLoraConfig) -> Path:
    """Write a LoRA with a lower rank.

    Returns:
        The file written.
    Raises:
        UserError: it is a DoRA, has no higher rank already, or cannot be written in the format.
    """
    source, output = Path(config.input), Path(config.output)
    check_output(output, [source], config.overwrite)
    read = recognise_lora_file(source, config.family)
    _refuse_dora(read, "made smaller")
    fmt = read.format if config.format == "same" else config.format
    _check_names(read.states, read.family, fmt, source)
    states, kept = resize_states(read.states, read.family, fmt, config.rank, config.keep, source)
    how = f"rank {config.rank}" if config.rank else f"keep {config.keep}"
    written, _ = write_lora(output, states, read.family, fmt, config.dtype, read.metadata,
                            f"resized to {how} from {source.name}")
    _write_kept(kept)
    write_table("Resized", {
        "from": f"{source} ({read.format})", "to": f"{output} ({fmt})", "rank before": describe_lora(read)["rank"],
        **describe_lora(written), "kept": _describe_kept(kept),
    })
    return output


def average(config: AverageLoraConfig) -> Path:
    """Write the weighted sum of several LoRA files.

    Returns:
        The file written.
    Raises:
        UserError: they are of different families or bases, or one is a DoRA.
    """
    output = Path(config.output)
    entries = [parse_lora(entry) for entry in config.lora]
    check_output(output, [path for path, _ in entries], config.overwrite)
    first = recognise_lora_file(entries[0][0], config.family)
    files = [first, *(read_lora_file(path, first.family) for path, _ in entries[1:])]
    for file in files:
        _refuse_dora(file, "added up")
    bases = {file.metadata["base"]: file.path for file in files if "base" in file.metadata}
    if len(bases) > 1 and not config.ignore_base:
        named = ", ".join(f"{path} of {base!r}" for base, path in bases.items())
        raise UserError(f"these LoRA files name different base models: {named}; --ignore_base adds them up all the "
                        "same.")
    weights = [weight for _, weight in entries]
    states = sum_states([(file, weight) for file, weight in zip(files, weights, strict=True)])
    fmt = first.format if config.format == "same" else config.format
    kept: dict[str, Kept] = {}
    if config.rank:
        _check_names(states, first.family, fmt, output)
        states, kept = resize_states(states, first.family, fmt, config.rank, None, output)
    terms = " + ".join(f"{weight:g} * {file.path.name}" for file, weight in zip(files, weights, strict=True))
    base = {"base": next(iter(bases))} if len(bases) == 1 else {}
    written, _ = write_lora(output, states, first.family, fmt, config.dtype, base, terms)
    if kept:
        _write_kept(kept)
    write_table("Added up", {
        "sum": terms, "weights": f"as given, not normalised; they add up to {sum(weights):g}",
        "written": f"{output} ({fmt})", **describe_lora(written),
        "kept": _describe_kept(kept) if kept else "all of it",
    })
    return output


def write_lora(
    output: Path, states: Mapping[str, LoraState], family: ModelFamily, fmt: str, dtype: str | None,
    metadata: Mapping[str, str], history: str, keep_dtype: bool = False,
) -> tuple[LoraFile, float]:
    """Write adapters, and read them back.

    Args:
        history: How they came about, added to what the metadata says of it.
        keep_dtype: Without ``dtype``: that of the factors where this loses nothing, instead of float32.
    Returns:
        The file as read back, and how far its change of the weights is from the one meant, by norm.
    """
    _check_names(states, family, fmt, output)
    told = "; ".join(part for part in (metadata.get("history", ""), history) if part)
    save_lora(output, states, family, fmt, kept={**metadata, "history": told},
              dtype=getattr(torch, dtype) if dtype else None if keep_dtype else torch.float32)
    written = read_lora_file(output, family)
    return written, change_difference(states, written.states)


def check_output(output: Path, inputs: Iterable[Path], overwrite: bool) -> None:
    """Make sure, before any work, that a file can be written without loss of another.

    Raises:
        UserError: it is one of the inputs, exists, is a folder, or has an ending that says something else.
    """
    if output.suffix not in (".safetensors", *PICKLE_SUFFIXES):
        raise UserError(f"{output}: the name of the output must end in .safetensors (or .ckpt).")
    if output.is_dir():
        raise UserError(f"{output} is a folder; give the name of a file.")
    for path in inputs:
        if not path.exists():
            raise UserError(f"there is no file {path}.")
        if path.resolve() == output.resolve():
            raise UserError(f"{output} is also an input; choose another output, inputs are never overwritten.")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists already; choose another name, or give --overwrite.")


def describe_lora(file: LoraFile) -> dict[str, str]:
    """Rows of a table: what is in a LoRA file."""
    layers = [layer for state in file.states.values() for layer in state.layers.values()]
    kind = "DoRA" if any(layer.dora_scale is not None for layer in layers) else "LoRA"
    return {
        "layers": f"{len(layers)} of {', '.join(file.states)} ({kind})",
        "rank": file.metadata.get("rank") or _range([layer.rank for layer in layers]),
        "alpha": file.metadata.get("alpha") or _range([layer.alpha for layer in layers]),
        "precision": ", ".join(file.dtypes),
    }


def write_table(title: str, rows: Mapping[str, str]) -> None:
    """Show names and values on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    Console(markup=False).print(table)


def _write_kept(kept: Mapping[str, Kept]) -> None:
    """A row for each kind of layer: those of all blocks together, with the least that one of them kept."""
    from rich.console import Console
    from rich.table import Table

    kinds: dict[str, list[str]] = {}
    for name in kept:
        kinds.setdefault(re.sub(r"(?<=[._])\d+(?=[._])", "*", name, count=1), []).append(name)
    table = Table(title="Share of the squared norm that is kept", title_justify="left")
    for heading in ("layers", "number", "kept", "least"):
        table.add_column(heading, overflow="fold")
    for kind, names in kinds.items():
        table.add_row(kind, str(len(names)), f"{sum_kept(kept[name] for name in names).share:.2%}",
                      f"{min(kept[name].share for name in names):.2%}")
    Console(markup=False).print(table)


def _describe_kept(kept: Mapping[str, Kept]) -> str:
    worst = min(kept, key=lambda name: kept[name].share)
    return f"{sum_kept(kept.values()).share:.2%} in all, least {kept[worst].share:.2%} in {worst}"


def _progress(what: str, names: Sequence[str]) -> Iterable[str]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(names, what, console=console, transient=True, disable=not console.is_terminal)


def _only(file: LoraFile, components: Sequence[str]) -> LoraFile:
    """The part of a LoRA file that is for these networks; all of it when none are named."""
    states = {name: state for name, state in file.states.items() if not components or name in components}
    if not states:
        raise UserError(f"{file.path} changes {' and '.join(file.states)}, none of --components "
                        f"{','.join(components)}.")
    return replace(file, states=states)


def _refuse_dora(file: LoraFile, what: str) -> None:
    for component, state in file.states.items():
        for name, layer in state.layers.items():
            if layer.dora_scale is not None:
                raise UserError(f"{file.path} is a DoRA ({name!r} of {component}); its change depends on the model's "
                                f"weights and cannot be {what} without them.")


def _check_names(states: Mapping[str, LoraState], family: ModelFamily, fmt: str, path: Path) -> None:
    """Everything has a name in the format, or nothing is written.

    Raises:
        UserError: names what has none, and the formats that can represent it all.
    """
    dora = any(layer.dora_scale is not None for state in states.values() for layer in state.layers.values())
    absent = unnamed_layers(states, family, fmt)
    if not absent and not (dora and fmt != "diffusers"):
        return
    others = [other for other in (("diffusers",) if dora else FORMATS) if not unnamed_layers(states, family, other)]
    remedy = f"use --format {' or '.join(others)}" if others else "no format can hold all of it"
    if absent:
        raise UserError(f"{len(absent)} layers of {path} have no name in the {fmt} format, for example "
                        f"{', '.join(absent[:3])}; {remedy}.")
    raise UserError(f"{path} is a DoRA, which the {fmt} format cannot hold; {remedy}.")


def _family_of_base(path: Path, given: str | None) -> ModelFamily:
    names = [given] if given else recognise_base(path)
    if len(names) != 1:
        raise UserError(f"{path} fits {' or '.join(names) or 'no known family'}; say which with --family.")
    return get_family(names[0])


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
