"""The ``diffsynth`` command: train, generate, inspect, download."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from . import __version__
from .core.command_line import run_front_door
from .core.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Command:
    """One word after ``diffsynth``, or after a word that groups several commands."""

    run: Callable[[Sequence[str]], None]
    summary: str


@dataclass(frozen=True)
class Group:
    """A word that is followed by a command, such as ``cache`` in ``diffsynth cache stats``."""

    commands: Mapping[str, Command]
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
    if words and words[0] == "--version":
        sys.stdout.write(f"diffsynth {__version__}\n")
        return
    _choose(words, COMMANDS, "diffsynth", "Train and run diffusion models.")


def _choose(words: Sequence[str], commands: Mapping[str, Command | Group], called: str, summary: str) -> None:
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_overview(commands, called, summary))
        return
    if words[0] not in commands:
        raise UserError(f"unknown command {words[0]!r}; known: {', '.join(commands)}."
                        f"{did_you_mean(words[0], commands)}")
    chosen = commands[words[0]]
    if isinstance(chosen, Group):
        _choose(words[1:], chosen.commands, f"{called} {words[0]}", f"{chosen.summary[0].upper()}{chosen.summary[1:]}.")
    else:
        chosen.run(words[1:])


def _overview(commands: Mapping[str, Command | Group], called: str, summary: str) -> str:
    width = max(map(len, commands))
    listed = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in commands.items())
    return (f"usage: {called} COMMAND [OPTIONS]\n\n{summary}\n\ncommands:\n{listed}\n\n"
            f"'{called} COMMAND --help' lists the options of a command.\n")


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


def _replay(words: Sequence[str]) -> None:
    from .trainers.replay import ReplayConfig, report

    report(ReplayConfig.from_command_line(words, "diffsynth replay", """\
  diffsynth replay models/dog/replay/step-120.safetensors
  diffsynth replay step-120.safetensors --device cpu --json"""))


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


def _check(words: Sequence[str]) -> None:
    from .config import CheckConfig

    config = CheckConfig.from_command_line(words, "diffsynth check", """\
  diffsynth check data/dog --height 512 --width 512
  diffsynth check data/dog --html report.html --tokenizer_path models/FLUX --family flux""")
    from .trainers.check import report

    report(config)


def _download(words: Sequence[str]) -> None:
    from .config import DownloadConfig

    config = DownloadConfig.from_command_line(words, "diffsynth download", "  diffsynth download FLUX.1-dev")
    from .models.download import download_models

    for path in download_models(config.name, config.source):
        sys.stdout.write(f"{path}\n")


def _convert_lora(words: Sequence[str]) -> None:
    from .trainers.lora_options import ConvertLoraConfig

    config = ConvertLoraConfig.from_command_line(words, "diffsynth convert lora", """\
  diffsynth convert lora dog.safetensors dog-comfyui.safetensors --format comfyui""")
    from .trainers.convert import convert_lora

    convert_lora(config)


def _merge_lora(words: Sequence[str]) -> None:
    from .trainers.lora_options import MergeLoraConfig

    config = MergeLoraConfig.from_command_line(words, "diffsynth lora merge", """\
  diffsynth lora merge flux1-dev.safetensors flux1-dev-dog.safetensors --lora dog.safetensors:0.8
  diffsynth lora merge FLUX.1-dev/transformer merged --lora dog.safetensors,style.safetensors:0.5""")
    from .trainers.lora_files import merge_lora

    merge_lora(config)


def _extract_lora(words: Sequence[str]) -> None:
    from .trainers.lora_options import ExtractLoraConfig

    config = ExtractLoraConfig.from_command_line(words, "diffsynth lora extract", """\
  diffsynth lora extract flux1-dev.safetensors tuned.safetensors tuned-lora.safetensors --rank 64""")
    from .trainers.lora_files import extract

    extract(config)


def _resize_lora(words: Sequence[str]) -> None:
    from .trainers.lora_options import ResizeLoraConfig

    config = ResizeLoraConfig.from_command_line(words, "diffsynth lora resize", """\
  diffsynth lora resize dog.safetensors dog-8.safetensors --rank 8
  diffsynth lora resize dog.safetensors dog-small.safetensors --keep 0.95""")
    from .trainers.lora_files import resize

    resize(config)


def _average_lora(words: Sequence[str]) -> None:
    from .trainers.lora_options import AverageLoraConfig

    config = AverageLoraConfig.from_command_line(words, "diffsynth lora average", """\
  diffsynth lora average both.safetensors --lora dog.safetensors:0.5,style.safetensors:0.5""")
    from .trainers.lora_files import average

    average(config)


def _cache_stats(words: Sequence[str]) -> None:
    from .trainers.cache_options import CacheStatsConfig

    config = CacheStatsConfig.from_command_line(words, "diffsynth cache stats", "  diffsynth cache stats")
    from .trainers.cache import report_stats

    report_stats(config)


def _cache_verify(words: Sequence[str]) -> None:
    from .trainers.cache_options import CacheVerifyConfig

    config = CacheVerifyConfig.from_command_line(words, "diffsynth cache verify", "  diffsynth cache verify --repair")
    from .trainers.cache import verify

    verify(config)


def _cache_prune(words: Sequence[str]) -> None:
    from .trainers.cache_options import CachePruneConfig

    config = CachePruneConfig.from_command_line(words, "diffsynth cache prune", """\
  diffsynth cache prune --unused_for_days 30 --dry_run
  diffsynth cache prune models/cache --max_gb 200""")
    from .trainers.cache import prune

    prune(config)


COMMANDS: dict[str, Command | Group] = {
    "train": Command(_train, "train a LoRA or a model on pictures with captions"),
    "generate": Command(_generate, "draw pictures from a prompt"),
    "replay": Command(_replay, "run a step again that gave NaN or infinity"),
    "inspect": Command(_inspect, "say what is in a checkpoint, a LoRA file or a data set"),
    "check": Command(_check, "look for what is wrong in a data set"),
    "download": Command(_download, "fetch models by name"),
    "cache": Group({
        "stats": Command(_cache_stats, "say what is in the cache, and what of it is used"),
        "verify": Command(_cache_verify, "read every entry and name the damaged ones"),
        "prune": Command(_cache_prune, "remove entries that no run uses"),
    }, "look after the cache of encoded data"),
    "convert": Group({
        "lora": Command(_convert_lora, "write a LoRA file in the names of another program"),
    }, "write a file in another format"),
    "lora": Group({
        "merge": Command(_merge_lora, "add LoRA files into the weights of a model"),
        "extract": Command(_extract_lora, "make a LoRA of what full training changed"),
        "resize": Command(_resize_lora, "lower the rank of a LoRA"),
        "average": Command(_average_lora, "add up several LoRA files"),
    }, "merge, extract, resize and average LoRA files"),
}
