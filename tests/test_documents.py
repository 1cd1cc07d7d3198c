"""What README and docs print exists: commands, options, paths, names, links. What exists is in the docs."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffsynth.config import CheckConfig, DownloadConfig, GenerateConfig, InspectConfig, TrainConfig
from diffsynth.core.command_line import is_positional, option_name
from diffsynth.core.options import Options
from diffsynth.trainers.cache_options import CachePruneConfig, CacheStatsConfig, CacheVerifyConfig
from diffsynth.trainers.lora_options import (
    AverageLoraConfig,
    ConvertLoraConfig,
    ExtractLoraConfig,
    MergeLoraConfig,
    ResizeLoraConfig,
)
from diffsynth.trainers.replay import ReplayConfig
from diffsynth.trainers.text_to_image import TextToImageOptions

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "README_zh.md"]
PAGES = [*READMES, *sorted((ROOT / "docs").rglob("*.md"))]
SCHEMAS: dict[str, type[Options]] = {
    "train": TrainConfig, "generate": GenerateConfig, "inspect": InspectConfig, "download": DownloadConfig,
    "check": CheckConfig, "replay": ReplayConfig,
    "convert lora": ConvertLoraConfig, "lora merge": MergeLoraConfig, "lora extract": ExtractLoraConfig,
    "lora resize": ResizeLoraConfig, "lora average": AverageLoraConfig,
    "cache stats": CacheStatsConfig, "cache verify": CacheVerifyConfig, "cache prune": CachePruneConfig,
}
TRAIN_SCRIPT = "examples/flux/model_training/train.py"
OTHER_PROGRAMS = {"accelerate", "cd", "cp", "export", "git", "make", "modelscope", "pip", "python", "tensorboard"}
OTHER_FLAGS = {"--config_file", "--dataset", "--help", "--local_dir", "--logdir", "--multi_gpu", "--num_processes",
               "--print_config"}
"""Flags of programs that are not ours, and ours that are no options of a run."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REPOSITORY_PATH = re.compile(r"(?<![\w./-])(?:examples|docs|diffsynth|tests|benchmarks)/[\w./-]+")
PLACEHOLDER = re.compile(r"[<{*]|\.\.\.")


@dataclass(frozen=True)
class Block:
    page: Path
    language: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for fence in FENCE.finditer(text):
            found.append(Block(page, fence[1], fence[2], text.count("\n", 0, fence.start()) + 1))
    return [block for block in found if block.language in languages]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands() -> list[tuple[Block, list[str]]]:
    found = []
    for block in blocks("bash"):
        lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
        for line in lines:
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                found.append((block, words))
    return found


def options_of_script(path: Path) -> type[Options]:
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    return next(cls for cls in classes if issubclass(cls, TextToImageOptions) and cls is not TextToImageOptions)


def spellings(options: type[Options]) -> set[str]:
    fields = options.model_fields.items()
    flags = {f"--{option_name(name, field)}" for name, field in fields if not is_positional(field)}
    switches = {f"--no-{name}" for name, field in fields if field.annotation is bool}
    return flags | switches | ({"--config"} if options.takes_config else set())


def read_options(options: type[Options], words: list[str]) -> None:
    """The schema itself reads the words; a configuration file is somebody's own and need not be here."""
    if "--config" in words:
        at = words.index("--config")
        words = words[:at] + words[at + 2 :]
    options.from_sources(command_line=words)


def check_command(words: list[str]) -> None:
    if words[0] == "diffsynth":
        if words[-1] != "--help":
            name = words[1] if words[1] in SCHEMAS else " ".join(words[1:3])
            read_options(SCHEMAS[name], words[1 + len(name.split()) :])
        return
    assert words[0] in OTHER_PROGRAMS, f"unknown program {words[0]}"
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    script = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
    if script is None:
        return
    path, arguments = words[script], words[script + 1 :]
    assert (ROOT / path).is_file(), f"there is no {path}"
    if arguments == ["-h"] or arguments == ["--help"]:
        return
    if path == TRAIN_SCRIPT:
        read_options(TrainConfig, arguments)
    elif path.startswith("examples/train/"):
        read_options(options_of_script(ROOT / path), arguments)
    else:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert all(f'"{word}"' in text for word in arguments if word.startswith("--"))


def test_there_are_documents():
    assert {page.name for page in PAGES} >= {
        "README.md", "README_zh.md", "architecture.md", "data.md", "training.md", "adapters.md", "adding_a_family.md"}


def test_printed_commands_are_accepted():
    wrong = []
    for block, words in commands():
        try:
            check_command(words)
        except (ValueError, AssertionError, KeyError) as error:
            wrong.append(f"{block} {words[0]} {words[1]}: {error}")
    assert not wrong, "\n".join(wrong)


def test_printed_yaml_is_a_configuration():
    printed = list(blocks("yaml"))
    assert printed
    for block in printed:
        options = yaml.safe_load(block.text)
        assert set(options) <= set(TrainConfig(**options).model_fields_set)


def ours_in(tree: ast.Module) -> dict[str, Any]:
    """Names that a program imports from this package, and the objects they stand for."""
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "diffsynth":
            module = importlib.import_module(str(node.module))
            names.update({alias.asname or alias.name: getattr(module, alias.name) for alias in node.names})
    return names


def check_call(node: ast.Call, names: dict[str, Any], page: str) -> None:
    """Keyword arguments of calls to our classes and functions, and to methods of ``pipe`` and ``model_manager``."""
    owners = {"pipe": names.get("FluxImagePipeline"), "model_manager": names.get("ModelManager"), **names}
    target: Any = None
    if isinstance(node.func, ast.Name):
        target = owners.get(node.func.id)
        target = target.__call__ if node.func.id == "pipe" and target else target
    elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        owner = owners.get(node.func.value.id)
        target = getattr(owner, node.func.attr) if owner is not None else None
    if target is None:
        return
    if isinstance(target, type) and issubclass(target, Options):
        accepted = set(target.model_fields)
    else:
        parameters = inspect.signature(target).parameters
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
        accepted = set(parameters)
    given = {keyword.arg for keyword in node.keywords if keyword.arg}
    assert given <= accepted, f"{page}: {ast.unparse(node.func)} does not take {sorted(given - accepted)}"


def test_printed_python_names_what_exists():
    for block in blocks("python"):
        tree = ast.parse(block.text, str(block))
        names = ours_in(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                check_call(node, names, str(block))


def test_mentioned_paths_exist():
    wrong = []
    for page in PAGES:
        for found in REPOSITORY_PATH.finditer(page.read_text(encoding="utf-8")):
            path = found.group().rstrip(".")
            # what a run writes, and names with a gap to fill in
            following = page.read_text(encoding="utf-8")[found.end() : found.end() + 1]
            if following in ("<", "{", "*") or path.startswith("examples/quickstart/output"):
                continue
            if not (ROOT / path).exists():
                wrong.append(f"{page.name}: {path}")
    assert not wrong, "\n".join(wrong)


def test_mentioned_options_exist():
    known = set().union(*map(spellings, SCHEMAS.values()), spellings(TextToImageOptions), OTHER_FLAGS)
    known |= spellings(options_of_script(ROOT / "examples/train/flux/train_flux_lora.py"))
    wrong = [f"{page.name}: {flag}" for page in PAGES for span in inline_code(page)
             for flag in re.findall(r"(?<![\w-])--[\w-]+", span) if flag not in known]
    assert not wrong, "\n".join(wrong)


def test_mentioned_modules_and_variables_exist():
    library = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "diffsynth").rglob("*.py"))
    wrong = []
    for page in PAGES:
        for span in inline_code(page):
            if re.fullmatch(r"diffsynth(\.\w+)+", span):
                module = span
                while module and importlib.util.find_spec(module.split(".")[0]):
                    try:
                        found = importlib.import_module(module)
                    except ModuleNotFoundError:
                        module = module.rpartition(".")[0]
                        continue
                    for part in span[len(module) :].strip(".").split(".") if span != module else []:
                        found = getattr(found, part, None)
                    if found is None:
                        wrong.append(f"{page.name}: {span}")
                    break
            for variable in re.findall(r"DIFFSYNTH_\w+", span):
                if variable not in library:
                    wrong.append(f"{page.name}: {variable}")
    assert not wrong, "\n".join(wrong)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    wrong = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if target.startswith(("http://", "https://")):
                continue
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            if not path.exists():
                wrong.append(f"{page.name}: {target} does not exist")
            elif anchor and path.suffix == ".md" and anchor not in anchors(path):
                wrong.append(f"{page.name}: {target} has no such heading")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("schema", [*SCHEMAS.values(), TextToImageOptions],
                         ids=lambda schema: schema.__name__)
def test_every_option_is_in_the_docs(schema):
    texts = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page not in READMES)
    names = {option_name(name, field) for name, field in schema.model_fields.items() if not is_positional(field)}
    missing = sorted(name for name in names if f"--{name}`" not in texts)
    assert not missing


def test_both_readmes_print_the_same_commands():
    printed = blocks("bash", "python", "yaml")
    english, chinese = ([(block.language, block.text) for block in printed if block.page == page] for page in READMES)
    assert english == chinese
