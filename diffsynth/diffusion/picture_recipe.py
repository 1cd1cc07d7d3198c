"""What a picture was made from and how, as it stands in its file; enough to make it again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from ..config import PromptOptions
from ..core.errors import UserError
from ..core.picture_file import read_picture_text

Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32,64}$")]
_Plain = Annotated[str, StringConstraints(max_length=200)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


def _check_path(path: str) -> str:
    # a path that begins with two slashes would ask another machine for the file
    if not path or "\0" in path or path.startswith(("//", "\\\\")) or not Path(path).is_absolute():
        raise ValueError("it names a file in a way that is not accepted")
    return path


class ModelFile(_Part):
    """Where a network came from."""

    component: _Plain
    paths: tuple[str, ...] = Field(min_length=1, max_length=1000)
    fingerprint: Hash

    _paths = field_validator("paths")(lambda paths: tuple(map(_check_path, paths)))


class LoraFile(_Part):
    """A LoRA file and its strength."""

    path: str
    strength: float
    sha256: Hash

    _path = field_validator("path")(_check_path)


class PictureRecipe(_Part):
    """Everything that ``diffsynth generate`` needs to draw a picture again."""

    version: Literal[1]
    diffsynth: _Plain
    """Version of this program."""
    family: _Plain
    device: _Plain
    """Kind of device: ``cpu``, ``cuda`` or ``mps``; another one rounds otherwise."""
    torch_dtype: Literal["bfloat16", "float16", "float32"]
    picture: dict[str, str | int | float | bool | None]
    """Values of ``PromptOptions``, among them the seed."""
    index: int = Field(ge=0, lt=10_000)
    """Which one of the pictures that were drawn together."""
    input_image_sha256: Hash | None
    models: tuple[ModelFile, ...] = Field(min_length=1, max_length=100)
    fp8_models: tuple[_Plain, ...]
    tokenizer_path: str | None
    loras: tuple[LoraFile, ...] = Field(max_length=1000)

    @field_validator("picture")
    @classmethod
    def _complete(cls, value: dict) -> dict:
        options = PromptOptions(**value)
        if options.seed is None or options.num_images > 10_000 or options.num_inference_steps > 100_000:
            raise ValueError("it gives no seed, or numbers that no picture was made with")
        if options.input_image is not None:
            _check_path(options.input_image)
        return value

    @property
    def options(self) -> PromptOptions:
        return PromptOptions(**self.picture)

    def text(self, index: int = 0) -> str:
        """As it stands in the file of one picture."""
        return json.dumps({**self.model_dump(mode="json"), "index": index}, sort_keys=True)


def read_recipe(path: Path) -> PictureRecipe:
    """The recipe in a picture's file.

    Raises:
        UserError: the file is no picture, holds no recipe, or one that this program did not write.
    """
    text = read_picture_text(path)
    if text is None:
        raise UserError(f"{path} does not say how it was made; only pictures of diffsynth generate and sample pictures "
                        "of a run do, as png, jpg or webp, and as long as no other program has saved them again.")
    try:
        return PictureRecipe.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "its form"
        raise UserError(f"{path}: what it says about how it was made is not as this program writes it "
                        f"({where}: {problem['msg']}).") from error


def fingerprint_text(fingerprint: str) -> str:
    """A short form of a component's fingerprint."""
    return hashlib.blake2b(fingerprint.encode("utf-8"), digest_size=16).hexdigest()
