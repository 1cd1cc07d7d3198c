"""Witnesses of the options of the other commands, each run by its words."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from diffsynth.cli import COMMANDS, dispatch
from diffsynth.core.command_line import is_positional, option_name
from diffsynth.core.errors import UserError
from diffsynth.core.options import Options
from diffsynth.models.download import presets
from tests.contract.schemas import commands, schema_of, schemas

from .lab import Lab
from .table import Look, Witness, made

OUT = "{out}"
"""Stands for a folder of its own in the options."""
Result = tuple[str, dict[str, str], str]
"""What a command printed, the files that it left in its folder, and how it ended."""
Files = Callable[[Lab, Path], None]


def ran(schema: str, prepare: Files | None = None, keeps_refusals: bool = False) -> Look:
    """A look at the command that reads its words by a schema.

    Args:
        schema: Name of the class.
        prepare: Puts files into the command's folder.
        keeps_refusals: The command prints a report and then refuses; both are the result.
    """
    command = next(name for name, entry in commands(COMMANDS).items() if schema_of(entry) == schema)
    options_class = schemas()[schema]

    def look(lab: Lab, options: dict[str, Any]) -> Result:
        folder = lab.fresh()
        folder.mkdir()
        if prepare is not None:
            prepare(lab, folder)
        words = [*command.split(), *as_words(options_class, options)]
        told, ended = io.StringIO(), "done"
        with redirect_stdout(told), lab.offline_hub():
            try:
                dispatch([word.replace(OUT, str(folder)) for word in words])
            except UserError as error:
                ended = str(error).replace(str(folder), OUT)
                if not keeps_refusals:
                    raise UserError(ended) from error
        left = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(folder.rglob("*")) if path.is_file()}
        return told.getvalue().replace(str(folder), OUT), left, ended

    return look


def as_words(schema: type[Options], options: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for name, field in schema.model_fields.items():
        if name not in options:
            continue
        value = options[name]
        if is_positional(field):
            words += [value] if isinstance(value, str) else value
        elif isinstance(value, bool):
            words.append(f"--{'' if value else 'no_'}{option_name(name, field)}")
        else:
            words += [f"--{option_name(name, field)}", json.dumps(value) if isinstance(value, tuple) else str(value)]
    return words


def printed(result: Result) -> str:
    return result[0]


def files(result: Result) -> dict[str, str]:
    return result[1]


def packs(result: Result) -> list[str]:
    """What is left of a cache."""
    return [name for name in result[1] if "/packs/" in name]


def table(look: Look, base: Callable[[Lab], dict[str, Any]], *rows: Witness) -> list[Witness]:
    """The same look for all rows, and the same options beside their own."""
    return [Witness(row.option, row.value, look, row.seen, _beside(base, row), row.refused) for row in rows]


def _beside(base: Callable[[Lab], dict[str, Any]], row: Witness) -> Callable[[Lab], dict[str, Any]]:
    def both(lab: Lab) -> dict[str, Any]:
        given = {**base(lab), **made(row.base, lab)}
        return {name: value for name, value in given.items() if value is not None}

    return both


def row(option: str, value: Any, seen: Callable[[Any], Any], refused: str | None = None, **base: Any) -> Witness:
    return Witness(option, value, lambda lab, options: None, seen, base, refused)


def _existing(lab: Lab, folder: Path) -> None:
    (folder / "there.safetensors").write_bytes(b"something")


OVERWRITE = row("overwrite", True, files, "exists", output=f"{OUT}/there.safetensors")
FAMILY = row("family", "nothing", files, "no model family 'nothing'")
LORA_OUT = (OVERWRITE, FAMILY, row("output", f"{OUT}/other.safetensors", files), row("dtype", "bfloat16", files))

INSPECT = table(
    ran("InspectConfig"), lambda lab: dict(path=lab.two_pictures),
    row("path", lambda lab: lab.lora, printed),
    row("as_json", True, printed),
)
DOWNLOAD = table(
    ran("DownloadConfig"), lambda lab: dict(name=sorted(presets())[0]),
    row("name", "FLUX", printed, "there is no download called 'FLUX'|DIFFSYNTH_SKIP_DOWNLOAD"),
    row("source", "huggingface", printed, "DIFFSYNTH_SKIP_DOWNLOAD"),
)
CONVERT = table(
    ran("ConvertLoraConfig", _existing),
    lambda lab: dict(input=lab.lora, output=f"{OUT}/out.safetensors", format="diffusers"),
    row("input", lambda lab: lab.other_lora, files),
    row("format", "diffsynth", files),
    *LORA_OUT,
)
MERGE = table(
    ran("MergeLoraConfig", _existing),
    lambda lab: dict(base=lab.denoiser_file, output=f"{OUT}/out.safetensors", lora=lab.lora),
    row("base", lambda lab: lab.tuned_file, files),
    row("lora", lambda lab: f"{lab.lora}:0.5", files),
    row("components", lambda lab: lab.encoder, files, "component|hold"),
    row("max_shard_size", "100KB", files, output=f"{OUT}/folder"),
    *LORA_OUT,
)
EXTRACT = table(
    ran("ExtractLoraConfig", _existing),
    lambda lab: dict(base=lab.denoiser_file, tuned=lab.tuned_file, output=f"{OUT}/out.safetensors", rank=2,
                     ignore_other_changes=True, format="diffsynth"),
    row("rank", 1, files),
    row("format", "diffusers", files),
    row("ignore_other_changes", False, files, "ignore_other_changes"),
    row("device", "cuda:99", files, "'cuda:99' was asked for"),
    row("base", lambda lab: lab.tuned_file, files, "differ|equal|same"),
    row("tuned", lambda lab: lab.denoiser_file, files, "differ|equal|same"),
    *LORA_OUT,
)
RESIZE = table(
    ran("ResizeLoraConfig", _existing), lambda lab: dict(input=lab.lora, output=f"{OUT}/out.safetensors", rank=2),
    row("input", lambda lab: lab.other_lora, files),
    row("rank", 1, files),
    row("keep", 0.5, files, "give either --rank or --keep", rank=None),
    row("format", "diffusers", files),
    *LORA_OUT,
)
AVERAGE = table(
    ran("AverageLoraConfig", _existing), lambda lab: dict(lora=lab.lora, output=f"{OUT}/out.safetensors"),
    row("lora", lambda lab: f"{lab.lora}:0.5", files),
    row("rank", 1, files),
    row("format", "diffusers", files),
    Witness("ignore_base", True, lambda lab, options: None, files,
            lambda lab: dict(lora=f"{lab.lora},{lab.other_lora}"), "different base models"),
    *LORA_OUT,
)


def _cache(lab: Lab, folder: Path) -> None:
    shutil.copytree(lab.filled_cache, folder / "cache")


def _damaged_cache(lab: Lab, folder: Path) -> None:
    _cache(lab, folder)
    path = sorted((folder / "cache" / "packs").iterdir())[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _own_cache(lab: Lab) -> dict[str, Any]:
    return dict(folder=f"{OUT}/cache")


FOLDER = Witness("folder", f"{OUT}/cache", lambda lab, options: None, printed, dict(folder=None), "is no cache")
JSON = row("as_json", True, printed)
CACHE_STATS = table(ran("CacheStatsConfig", _cache), _own_cache, FOLDER, JSON)
CACHE_VERIFY = table(
    ran("CacheVerifyConfig", _damaged_cache, keeps_refusals=True), _own_cache,
    row("folder", f"{OUT}/nothing", printed), JSON, row("repair", True, packs),
)
CACHE_PRUNE = table(
    ran("CachePruneConfig", _cache), lambda lab: dict(_own_cache(lab), max_gb=1000.0),
    FOLDER, JSON,
    row("unused_for_days", 0.0, packs),
    row("max_gb", 0.0, packs),
    row("dry_run", True, packs, max_gb=0.0),
)
REPLAY = table(
    ran("ReplayConfig"), lambda lab: dict(file=lab.replay_file),
    row("file", "nowhere.safetensors", printed, "there is no file nowhere"),
    row("model_paths", lambda lab: lab.changed_models, printed, "is not the one of the run"),
    row("device", "cuda:99", printed, "'cuda:99' was asked for"),
    JSON,
)

_openers: set[int] = set()
_counting: list[str] = []


def _note_opener(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _counting and str(arguments[0]).startswith(_counting[0]) and str(
            arguments[0]).endswith(".png"):
        _openers.add(threading.get_ident())


sys.addaudithook(_note_opener)


def threads_of_check(lab: Lab, options: dict[str, Any]) -> bool:
    """Whether more than one thread opens the pictures."""
    _openers.clear()
    _counting.append(str(options["dataset_base_path"]))
    try:
        _CHECK(lab, options)
    finally:
        _counting.clear()
    return len(_openers) > 1


_CHECK = ran("CheckConfig", keeps_refusals=True)
CHECK = [
    *table(
        _CHECK, lambda lab: dict(dataset_base_path=lab.pictures),
        row("dataset_base_path", lambda lab: lab.damaged, printed),
        row("dataset_metadata_path", lambda lab: lab.other_metadata, printed),
        row("extra_inputs", "depth", printed),
        row("max_sequence_length", 2, printed),
        row("height", 48, printed, height=32, width=32),
        row("width", 48, printed, height=32, width=32),
        row("max_pixels", 1024, printed),
        row("html", f"{OUT}/sheet.html", lambda result: list(result[1])),
        row("model_paths", lambda lab: tuple(lab.family.model_files), printed),
        row("model_id_with_origin_paths", lambda lab: lab.repository, printed),
        Witness("tokenizer_path", lambda lab: str(lab.family.folder), lambda lab, options: None, lambda result: result,
                lambda lab: dict(family=lab.family.name)),
        Witness("family", lambda lab: lab.family.name, lambda lab, options: None, lambda result: result,
                lambda lab: dict(tokenizer_path=str(lab.family.folder))),
        JSON,
    ),
    Witness("data_file_keys", "image,second", _CHECK, printed,
            lambda lab: dict(dataset_base_path=lab.with_second_picture)),
    Witness("num_workers", 1, threads_of_check, base=lambda lab: dict(dataset_base_path=lab.spiking, num_workers=3)),
]

COMMAND_TABLES: dict[str, list[Witness]] = {
    "InspectConfig": INSPECT, "DownloadConfig": DOWNLOAD, "ConvertLoraConfig": CONVERT, "MergeLoraConfig": MERGE,
    "ExtractLoraConfig": EXTRACT, "ResizeLoraConfig": RESIZE, "AverageLoraConfig": AVERAGE,
    "CacheStatsConfig": CACHE_STATS, "CacheVerifyConfig": CACHE_VERIFY, "CachePruneConfig": CACHE_PRUNE,
    "ReplayConfig": REPLAY, "CheckConfig": CHECK,
}
