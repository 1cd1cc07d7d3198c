"""A witness for every option of every command: name of the set of options -> its witnesses."""

from __future__ import annotations

from .commands import COMMAND_TABLES
from .generate import GENERATE
from .older import OLDER
from .table import Observer, Refusal, Witness
from .train import TRAIN

WITNESSES: dict[str, list[Witness]] = {
    "TrainConfig": TRAIN, "GenerateConfig": GENERATE, "TextToImageOptions": OLDER, **COMMAND_TABLES,
}

__all__ = ["WITNESSES", "Observer", "Refusal", "Witness"]
