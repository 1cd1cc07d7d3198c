"""Options of the commands on LoRA files: convert, merge, extract, resize, average."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ..core.options import CommaList, Options

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_LEFT_OUT = "Left out: recognised from the file."


def _file(description: str, name: str) -> str:
    """A required word without an option name, such as ``IN``."""
    return Field(min_length=1, description=description,
                 json_schema_extra={"positional": True, "metavar": name, "option": name})


class LoraOutputOptions(Options):
    """How the file is written."""

    title: ClassVar[str] = "Output"
    family: str | None = Field(None, description=f"Model family, for example flux. {_LEFT_OUT}")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Precision in the file. Left out: what loses nothing."
    )
    overwrite: bool = Field(False, description="Replace the output file if it exists.")


class ConvertLoraConfig(LoraOutputOptions):
    """Write a LoRA file in the names of another program, with the same strength."""

    title: ClassVar[str] = "What to convert"
    format: Literal["diffusers", "kohya", "comfyui", "diffsynth"] = Field(description="Naming in the output file.")
    input: str = _file("LoRA file in any known format.", "IN")
    output: str = _file("File to write, .safetensors or .ckpt.", "OUT")


class MergeLoraConfig(Options):
    """Add LoRA files into the weights of a model; names, layout and dtype of the model stay."""

    title: ClassVar[str] = "What to merge"
    lora: CommaList = Field(min_length=1, description="LoRA files, each as PATH or PATH:STRENGTH, separated by commas.")
    components: CommaList = Field(
        (), description="Networks to merge into, for example dit. Left out: all that the LoRA files change."
    )
    family: str | None = Field(None, description=f"Model family, for example flux. {_LEFT_OUT}")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Precision of all weights in the output. Left out: that of each weight."
    )
    max_shard_size: str = Field("10GB", description="Largest file in an output folder, for example 5GB.")
    overwrite: bool = Field(False, description="Replace the output file if it exists; a folder is never replaced.")
    base: str = _file("Model: a file, one of its shards, or a folder.", "BASE")
    output: str = _file("File to write (.safetensors), or a new folder for shards.", "OUT")

    @field_validator("max_shard_size")
    @classmethod
    def _size(cls, value: str) -> str:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", value.strip(), re.IGNORECASE)
        if not found or float(found[1]) <= 0:
            raise ValueError(f"{value!r} is no size; write for example 5GB or 500MB")
        return value

    @property
    def max_shard_bytes(self) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", self.max_shard_size.strip(), re.IGNORECASE)
        assert found is not None  # the schema has looked
        return int(float(found[1]) * _UNITS[found[2].upper()])


class ExtractLoraConfig(LoraOutputOptions):
    """Make a LoRA of what full training changed in a model, by singular values."""

    title: ClassVar[str] = "What to extract"
    rank: int = Field(ge=1, description="Rank of each layer in the file.")
    format: Literal["auto", "diffusers", "kohya", "comfyui", "diffsynth"] = Field(
        "auto", description="Naming in the file; auto is what most programs read for the family."
    )
    ignore_other_changes: bool = Field(
        False, description="Leave out changed norms, biases, embeddings and convolutions, which no LoRA can hold."
    )
    device: str = Field("auto", description="Where to compute: auto, cpu, cuda, cuda:1, ...")
    base: str = _file("Model before training: a file, one of its shards, or a folder.", "BASE")
    tuned: str = _file("Model after training, of any layout.", "TUNED")
    output: str = _file("LoRA file to write.", "OUT")


class ResizeLoraConfig(LoraOutputOptions):
    """Lower the rank of a LoRA, keeping as much of its effect as that rank can."""

    title: ClassVar[str] = "What to resize"
    rank: int | None = Field(None, ge=1, description="New rank of each layer in the file.")
    keep: float | None = Field(
        None, gt=0, le=1, description="Instead: the lowest rank of each layer that keeps this share, such as 0.95."
    )
    format: Literal["same", "diffusers", "kohya", "comfyui", "diffsynth"] = Field(
        "same", description="Naming in the output file; same is that of the input."
    )
    input: str = _file("LoRA file in any known format.", "IN")
    output: str = _file("LoRA file to write.", "OUT")

    @model_validator(mode="after")
    def _one_of_two(self) -> ResizeLoraConfig:
        if (self.rank is None) == (self.keep is None):
            raise ValueError("give either --rank or --keep")
        return self


class AverageLoraConfig(LoraOutputOptions):
    """Add up several LoRA files, each with a weight, into one that changes the model by the weighted sum."""

    title: ClassVar[str] = "What to average"
    lora: CommaList = Field(
        min_length=1, description="LoRA files, each as PATH or PATH:WEIGHT, separated by commas; weights as they are."
    )
    rank: int | None = Field(None, ge=1, description="Lower the rank of the sum to this. Left out: the sum is exact.")
    format: Literal["same", "diffusers", "kohya", "comfyui", "diffsynth"] = Field(
        "same", description="Naming in the output file; same is that of the first input."
    )
    ignore_base: bool = Field(False, description="Add up LoRA files although they name different base models.")
    output: str = _file("LoRA file to write.", "OUT")
