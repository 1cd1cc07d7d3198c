"""Files that witnesses need, each made when it is first asked for."""

from __future__ import annotations

import csv
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffsynth.config import TrainConfig
from tests.contract.injecting import spoiled
from tests.contract.lora_states import random_layer
from tests.contract.tiny import FamilyAtWork
from tests.pictures import draw_picture, make_dataset


class Lab:
    """A family at work, and files made of it."""

    def __init__(self, family: FamilyAtWork, folder: Path) -> None:
        self.family, self.folder = family, folder
        self._count = itertools.count()

    def fresh(self) -> Path:
        """A folder that is not there yet, whose path has the same length each time."""
        return self.folder / f"fresh-{next(self._count):05d}"

    @property
    def denoiser(self) -> str:
        return self.family.tiny.options["lora_base_model"]

    @property
    def encoder(self) -> str:
        """A component that is not the denoiser."""
        return next(c.name for c in self.family.family.components if c.name != self.denoiser)

    @property
    def cache(self) -> str:
        """Shared by all runs, so that the encoders run once."""
        return str(self.folder / "cache")

    # ---- data sets

    @cached_property
    def pictures(self) -> str:
        """Four pictures of two shapes."""
        return str(make_dataset(self.folder / "pictures", count=4, sizes=[(80, 48), (48, 64)]))

    @cached_property
    def two_pictures(self) -> str:
        return str(make_dataset(self.folder / "two", count=2))

    @cached_property
    def other_pictures(self) -> str:
        return self._captioned("other", [f"another picture, number {index}" for index in range(4)])

    @cached_property
    def other_metadata(self) -> str:
        path = Path(self.pictures) / "other.csv"
        path.write_text("image,prompt\nimage_0.png,the only one\n", encoding="utf-8")
        return str(path)

    @cached_property
    def with_second_picture(self) -> str:
        folder = Path(self._captioned("second", ["a", "b"]))
        rows = ["image,prompt,second", "image_0.png,a,image_1.png", "image_1.png,b,image_0.png"]
        (folder / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        return str(folder)

    @cached_property
    def damaged(self) -> str:
        folder = make_dataset(self.folder / "damaged", count=3)
        (folder / "image_1.png").write_bytes(b"no picture")
        return str(folder)

    @cached_property
    def bad_captions(self) -> str:
        """The toy's loss is NaN on every one of these."""
        return self._captioned("bad", ["bad"] * 6)

    @cached_property
    def spiking(self) -> str:
        """Twenty-four equal pictures; one of them makes the toy's loss jump."""
        return self._captioned("spiking", ["a"] * 23 + ["spike"], equal=True)

    def _captioned(self, name: str, captions: list[str], equal: bool = False) -> str:
        folder = self.folder / name
        folder.mkdir()
        with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "prompt"])
            for index, caption in enumerate(captions):
                draw_picture(0 if equal else index).save(folder / f"image_{index}.png")
                writer.writerow([f"image_{index}.png", caption])
        return str(folder)

    # ---- models

    @cached_property
    def changed_models(self) -> tuple[str, ...]:
        """The same networks with other weights."""
        folder = self.folder / "changed" / "models"
        shutil.copytree(self.family.folder, folder)
        for number, path in enumerate(sorted(folder.rglob("*.safetensors"))):
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            generator = torch.Generator().manual_seed(number)
            tensors = {key: tensor + 0.05 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
                       for key, tensor in load_file(path).items()}
            save_file(tensors, path, metadata)
        return tuple(self.family.tiny.model_files(folder))

    @cached_property
    def models_without_tokenizers(self) -> tuple[str, ...]:
        folder = self.folder / "bare" / "a" / "b"
        subfolders = [subfolder for _, subfolder in self.family.family.tokenizers.values()]
        shutil.copytree(self.family.folder, folder, ignore=shutil.ignore_patterns(*subfolders))
        return tuple(self.family.tiny.model_files(folder))

    @cached_property
    def repository(self) -> str:
        """The model files as ``owner/name:pattern`` entries below ``models_folder``."""
        target = self.models_folder / "owner" / "name"
        target.parent.mkdir(parents=True)
        shutil.copytree(self.family.folder, target)
        entries = []
        for file in self.family.model_files:
            relative = Path(file).relative_to(self.family.folder).as_posix()
            entries.append(f"owner/name:{relative}{'/*.safetensors' if Path(file).is_dir() else ''}")
        return ",".join(entries)

    @property
    def models_folder(self) -> Path:
        return self.folder / "models"

    @contextmanager
    def offline_hub(self) -> Iterator[None]:
        """Repositories are looked for in ``models_folder`` and nowhere else."""
        given = {"DIFFSYNTH_MODEL_BASE_PATH": str(self.models_folder), "DIFFSYNTH_SKIP_DOWNLOAD": "True"}
        before = {name: os.environ.get(name) for name in given}
        os.environ.update(given)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    @property
    def denoiser_file(self) -> str:
        return str(self._path_of(self.family.model_files))

    @property
    def tuned_file(self) -> str:
        """The denoiser with other weights, in norms and biases too."""
        return str(self._path_of(list(self.changed_models)))

    def _path_of(self, files: list[str]) -> Path:
        own = self.family.pipeline(deferred=True).component_paths[self.denoiser][0]
        position = next(index for index, file in enumerate(self.family.model_files)
                        if own == Path(file) or Path(file) in own.parents)
        given = Path(files[position])
        return given if given.suffix else given / own.relative_to(self.family.model_files[position])

    # ---- LoRA files, runs

    @cached_property
    def lora(self) -> str:
        """A LoRA of rank 4 on the denoiser, strong enough to be seen."""
        return self._trained("lora")

    @cached_property
    def other_lora(self) -> str:
        """One of another base model."""
        return self._trained("other-lora", model_paths=self.changed_models)

    def _trained(self, name: str, **options: Any) -> str:
        from diffsynth.adapters.files import read_lora_file, save_lora

        self.family.train(Path(self.two_pictures), self.folder / name, max_steps=1, **options)
        path = self.folder / name / "step-1.safetensors"
        read = read_lora_file(path, self.family.family)
        for state in read.states.values():
            for number, (key, layer) in enumerate(state.layers.items()):
                shape = (layer.up.shape[0], *layer.down.shape[1:])
                state.layers[key] = random_layer(shape, layer.rank, 8.0, number)
        base = {"base": name}
        save_lora(self.folder / f"{name}.safetensors", read.states, self.family.family, "diffsynth", kept=base)
        return str(self.folder / f"{name}.safetensors")

    @cached_property
    def filled_cache(self) -> Path:
        """A cache with one damaged pack that no run uses any more; copied before a command changes it."""
        folder = self.folder / "filled"
        self.family.train(Path(self.two_pictures), self.folder / "filling", max_steps=1, cache_path=str(folder))
        return folder

    @cached_property
    def replay_file(self) -> str:
        """The record of a step that was spoiled on purpose."""
        run = spoiled(self.family, {1: ("gradient", float("nan"))})
        run.train(Path(self.two_pictures), self.folder / "spoiled", max_steps=1, cache_path=self.cache)
        return str(next((self.folder / "spoiled" / "replay").glob("*.safetensors")))

    @cached_property
    def drawn_picture(self) -> str:
        from diffsynth.config import GenerateConfig
        from diffsynth.trainers.generate import generate

        options = dict(self.drawing(), output=str(self.folder / "drawn.png"))
        return str(generate(GenerateConfig(**options))[0])

    def drawing(self) -> dict[str, Any]:
        """The least that a picture is drawn from."""
        return dict(prompt="a dog", height=32, width=32, num_inference_steps=2, seed=1, torch_dtype="float32",
                    device="cpu", model_paths=tuple(self.family.model_files))

    def config(self, **options: Any) -> TrainConfig:
        """A short training of the family on two pictures."""
        defaults = dict(max_steps=1, cache_path=self.cache)
        return self.family.config(Path(self.two_pictures), self.fresh(), **{**defaults, **options})
