"""One thing changed at a time, what has to be encoded again for it, and a counter of what is."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

import diffsynth.diffusion.frozen_cache as frozen_cache
from diffsynth.diffusion.cache_fill import fill_cache
from diffsynth.diffusion.cache_keys import columns_of_prefix
from diffsynth.diffusion.frozen_cache import CachedDataset
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.diffusion.unit import PipelineUnit
from diffsynth.trainers.run import load_pipeline_class
from tests.pictures import draw_picture

from .tiny import FamilyAtWork


class Case:
    """A data set, networks and options of which one thing may be changed; nothing of the originals is touched."""

    def __init__(self, family: FamilyAtWork, pictures: Path, folder: Path, cache: Path) -> None:
        self.family, self.folder, self.cache = family, folder, cache
        self.data = Path(shutil.copytree(pictures, folder / "data", copy_function=shutil.copy))
        self.model_folder = family.folder
        self.options: dict[str, Any] = {"task": "sft:data_process"}
        self.dtype = torch.float32
        self.change_pipeline: Callable[[Any], None] = lambda pipe: None

    def rows(self) -> list[dict[str, str]]:
        with (self.data / "metadata.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def write_rows(self, rows: list[dict[str, str]]) -> None:
        with (self.data / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["image", "prompt"])
            writer.writeheader()
            writer.writerows(rows)

    def pipeline(self) -> Any:
        names = [component.name for component in self.family.family.components]
        return load_pipeline_class(self.family.family).from_pretrained(
            self.dtype, "cpu", self.family.tiny.model_files(self.model_folder), deferred=names)

    def module(self) -> PipelineTrainingModule:
        config = self.family.config(self.data, self.folder / "out", cache_path=str(self.cache), **self.options)
        pipe = self.pipeline()
        self.change_pipeline(pipe)
        return PipelineTrainingModule(pipe, config)

    def fill(self, stop: Callable[[], None] | None = None) -> CachedDataset:
        """Bring the cache up to date, as every run does before its first step."""
        import accelerate
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
        module = self.module()
        return fill_cache(accelerate.Accelerator(cpu=True), self.family.dataset(module.config), module, module.config,
                          stop)

    def encoder(self, of_captions: bool) -> str:
        """A network that encodes captions, or one that encodes pictures."""
        return next(unit.models[0] for unit, columns in units_of(self.family)
                    if unit.models and (columns == {"prompt"}) == of_captions)

    def change_weights(self, component: str) -> None:
        """Give the networks of this case a folder of their own, in which one number is another."""
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        self.model_folder = Path(shutil.copytree(
            self.family.folder.parent, self.folder / "models", copy_function=shutil.copy)) / self.family.folder.name
        path = self.pipeline().component_paths[component][-1]
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        name = next(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel() > 1)
        tensors[name] = tensors[name] * 1.01
        save_file(tensors, path, metadata)


@cache
def units_of(family: FamilyAtWork) -> list[tuple[PipelineUnit, frozenset[str]]]:
    """Units that have entries, and the columns that they read."""
    module = PipelineTrainingModule(family.pipeline(deferred=True), family.config(
        Path("data"), Path("out"), task="sft:data_process"))
    both = zip(module.prefix.units, columns_of_prefix(module), strict=True)
    return [(unit, columns) for unit, columns in both if unit.outputs]


@contextmanager
def encodings() -> Iterator[Counter[str]]:
    """Counts, by unit, how often something is encoded within this block."""
    counts: Counter[str] = Counter()
    real = frozen_cache.run_unit

    def counted(unit: Any, *arguments: Any) -> Any:
        counts[type(unit).__name__] += bool(unit.outputs)
        return real(unit, *arguments)

    frozen_cache.run_unit = counted
    try:
        yield counts
    finally:
        frozen_cache.run_unit = real
        for name in [name for name, count in counts.items() if not count]:
            del counts[name]


@dataclass(frozen=True)
class Change:
    """One thing that is changed, against six pictures with six captions that are in the cache already."""

    name: str
    apply: Callable[[Case], None]
    captions: int = 0
    """Captions that have to be encoded again."""
    pictures: int = 0
    """Pictures that have to be encoded again, mirrored and cropped ones counted by themselves."""
    network: Callable[[Case], str] | None = field(default=None, repr=False)
    """Only units that use this network are affected."""
    option: str | None = None
    """Only units that read this option are affected."""

    def expected(self, case: Case) -> dict[str, int]:
        """Unit -> how many of its entries are made again."""
        found = {}
        for unit, columns in units_of(case.family):
            spared = (self.network is not None and self.network(case) not in unit.models) or (
                self.option is not None and self.option not in unit.inputs)
            count = max(self.captions * ("prompt" in columns), self.pictures * (columns != {"prompt"}))
            if count and not spared:
                found[type(unit).__name__] = count
        return found


def _redraw(case: Case) -> None:
    draw_picture(7).save(case.data / "image_2.png")


def _rename(case: Case) -> None:
    (case.data / "image_2.png").rename(case.data / "renamed.png")
    case.write_rows([{**row, "image": row["image"].replace("image_2", "renamed")} for row in case.rows()])


def _recaption(case: Case) -> None:
    case.write_rows([{**row, "prompt": row["prompt"].replace("number 1", "number one")} for row in case.rows()])


def _equal_captions(case: Case) -> None:
    case.write_rows([{**row, "prompt": case.rows()[0]["prompt"]} for row in case.rows()])


def _caption_list(case: Case) -> None:
    rows: list[dict[str, Any]] = [dict(row) for row in case.rows()]
    rows[0]["prompt"] = [rows[0]["prompt"], "another caption of the first picture"]
    (case.data / "metadata.csv").unlink()
    (case.data / "metadata.json").write_text(json.dumps(rows), encoding="utf-8")


def _add_picture(case: Case) -> None:
    draw_picture(9).save(case.data / "image_9.png")
    case.write_rows([*case.rows(), {"image": "image_9.png", "prompt": "one more"}])


def _remove_picture(case: Case) -> None:
    case.write_rows(case.rows()[1:])


def _options(**options: Any) -> Callable[[Case], None]:
    return lambda case: case.options.update(options)


def _caption_encoder(case: Case) -> str:
    return case.encoder(of_captions=True)


def _picture_encoder(case: Case) -> str:
    return case.encoder(of_captions=False)


def _bfloat16(case: Case) -> None:
    case.dtype = torch.bfloat16


def _other_tokenizer(case: Case) -> None:
    name = next(iter(case.family.family.tokenizers))
    case.change_pipeline = lambda pipe: getattr(pipe, name).add_tokens(["qqq"])


def _adapted_encoder(case: Case) -> None:
    from diffsynth.adapters.fused import fuse_lora
    from diffsynth.adapters.state import LoraLayer, LoraState

    name = _caption_encoder(case)

    def fuse(pipe: Any) -> None:
        pipe.require_models([name])
        network = getattr(pipe, name)
        layer, linear = next((n, m) for n, m in network.named_modules() if isinstance(m, torch.nn.Linear))
        factors = LoraLayer(torch.ones(1, linear.in_features), torch.ones(linear.out_features, 1), 1.0, 1)
        fuse_lora(network, {layer: linear}, LoraState({layer: factors}), 0.1)

    case.change_pipeline = fuse


def _float8_encoder(case: Case) -> None:
    case.options["fp8_models"] = (_caption_encoder(case),)


CHANGES = [
    Change("nothing", lambda case: None),
    Change("content of a picture", _redraw, pictures=1),
    Change("name of a picture", _rename),
    Change("a caption", _recaption, captions=1),
    Change("all captions become the first", _equal_captions),
    Change("a second caption for one picture", _caption_list, captions=1),
    Change("a picture with a caption is added", _add_picture, captions=1, pictures=1),
    Change("a picture is removed", _remove_picture),
    Change("resolution", _options(height=48, width=48), pictures=6),
    Change("random flip on", _options(random_flip=True), pictures=6),
    Change("random crops on", _options(center_crop=False), pictures=24),
    Change("weights of a text encoder", lambda case: case.change_weights(_caption_encoder(case)), captions=6,
           network=_caption_encoder),
    Change("weights of the VAE", lambda case: case.change_weights(_picture_encoder(case)), pictures=6,
           network=_picture_encoder),
    Change("tokenizer", _other_tokenizer, captions=6),
    Change("precision (bfloat16)", _bfloat16, captions=6, pictures=6),
    Change("a text encoder in float8", _float8_encoder, captions=6, network=_caption_encoder),
    Change("a LoRA fused into a text encoder", _adapted_encoder, captions=6, network=_caption_encoder),
    Change("max_sequence_length", _options(max_sequence_length=8), captions=6, option="max_sequence_length"),
    Change("caption dropout on", _options(caption_dropout=0.1), captions=1),
    Change("learning rate, rank and seed", _options(learning_rate=0.1, lora_rank=2, seed=8)),
]
