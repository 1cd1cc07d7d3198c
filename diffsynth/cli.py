"""The ``diffsynth`` command: train, generate, inspect, download."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import __version__
from .core.command_line import run_front_door
from .core.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Command:
    """One word after ``diffsynth``."""

    run: Callable[[Sequence[str]], None]
    summary: str


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line of this process, or ``words``, and leave with an exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_front_door(lambda: dispatch(list(sys.argv[1:] if words is None else words)))


def dispatch(words: Sequence[str]) -> None:
    """Run one command.

    Raises:
        UserError: there is no such command, or the command was given bad input.
    """
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_overview())
        return
    if words[0] == "--version":
        sys.stdout.write(f"diffsynth {__version__}\n")
        return
    if words[0] not in COMMANDS:
        raise UserError(f"unknown command {words[0]!r}; known: {', '.join(COMMANDS)}."
                        f"{did_you_mean(words[0], COMMANDS)}")
    COMMANDS[words[0]].run(words[1:])


def _overview() -> str:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (f"usage: diffsynth COMMAND [OPTIONS]\n\nTrain and run diffusion models.\n\ncommands:\n{listed}\n\n"
            f"'diffsynth COMMAND --help' lists the options of a command.\n")


def _train(words: Sequence[str]) -> None:
    from .config import TrainConfig

    config = TrainConfig.from_command_line(words, "diffsynth train", """\
  diffsynth train --config run.yaml --output_path models/dog --lora_rank 16
  diffsynth train --dataset_base_path data/dog --height 512 --width 512 \\
    --model_paths '["flux1-dev.safetensors", "ae.safetensors",
                    "text_encoder/model.safetensors", "text_encoder_2"]' \\
    --lora_base_model dit --output_path models/dog --use_gradient_checkpointing""")
    from .trainers.run import check_run, relaunch_on_all_gpus, train

    command = ["-m", "diffsynth", "train", *words]
    if not relaunch_on_all_gpus(config.device, command, check=lambda: check_run(config)):
        train(config)


def _generate(words: Sequence[str]) -> None:
    from .config import GenerateConfig

    config = GenerateConfig.from_command_line(words, "diffsynth generate", """\
  diffsynth generate --prompt "a dog on the beach" --seed 1 --output dog.png \\
    --model_paths '["flux1-dev.safetensors", "ae.safetensors",
                    "text_encoder/model.safetensors", "text_encoder_2"]' \\
    --lora models/dog/epoch-0.safetensors:0.8""")
    from .trainers.generate import generate

    generate(config)


def _inspect(words: Sequence[str]) -> None:
    from .config import InspectConfig

    config = InspectConfig.from_command_line(words, "diffsynth inspect", """\
  diffsynth inspect flux1-dev.safetensors
  diffsynth inspect data/dog --json""")
    from .trainers.inspect import inspect, write_tables

    if config.as_json:
        import json

        sys.stdout.write(json.dumps(inspect(config.path), indent=2, ensure_ascii=False) + "\n")
    else:
        write_tables(inspect(config.path))


def _download(words: Sequence[str]) -> None:
    from .config import DownloadConfig

    config = DownloadConfig.from_command_line(words, "diffsynth download", "  diffsynth download FLUX.1-dev")
    from .models.download import download_models

    for path in download_models(config.name, config.source):
        sys.stdout.write(f"{path}\n")


COMMANDS: dict[str, Command] = {
    "train": Command(_train, "train a LoRA or a model on pictures with captions"),
    "generate": Command(_generate, "draw pictures from a prompt"),
    "inspect": Command(_inspect, "say what is in a checkpoint, a LoRA file or a data set"),
    "download": Command(_download, "fetch models by name"),
}
