"""The rules of the house that decay without a guard: where imports point, names, sizes, the public surface."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from diffsynth.models.registry import FAMILY_MODULES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "diffsynth"
LIBRARY = sorted(PACKAGE.rglob("*.py"))
ALL_CODE = [path for room in ("diffsynth", "examples", "tests", "benchmarks")
            for path in sorted((ROOT / room).rglob("*.py"))]

MAY_IMPORT = {
    "core": set(),
    "config": {"core"},
    "models": {"core", "config"},
    "adapters": {"core", "config", "models"},
    "diffusion": {"core", "config", "models", "adapters"},
    "pipelines": {"core", "config", "models", "adapters", "diffusion"},
    "trainers": {"core", "config", "models", "adapters", "diffusion", "pipelines"},
    "cli": {"core", "config", "models", "adapters", "diffusion", "pipelines", "trainers"},
    "__main__": {"cli"},
}
"""Room -> rooms below it. ``diffsynth/__init__.py`` is the lazy table of the public names and stands outside."""
HEAVY = {"accelerate", "diffusers", "matplotlib", "peft", "transformers"}

PUBLIC_NAMES = [
    "FluxImagePipeline", "ModelConfig", "ModelManager", "UnifiedDataset", "UserError", "__version__", "download_models",
    "load_component",
]
PAGES = {
    "diffsynth.diffusion.training_module:DiffusionTrainingModule": [],
    "diffsynth.diffusion.training_module:DiffusionTrainingModule.switch_pipe_to_training_mode": [
        "self", "pipe", "trainable_models", "lora_base_model", "lora_target_modules", "lora_rank"],
    "diffsynth.diffusion.loss:FlowMatchSFTLoss": ["pipe", "inputs"],
    "diffsynth.diffusion.logger:ModelLogger": ["output_path", "remove_prefix_in_ckpt"],
    "diffsynth.diffusion.runner:launch_training_task": ["accelerator", "dataset", "model", "model_logger"],
    "diffsynth.core.data:UnifiedDataset": [
        "base_path", "metadata_path", "repeat", "data_file_keys", "main_data_operator", "special_operator_map"],
    "diffsynth.core.data:UnifiedDataset.default_image_operator": ["base_path", "max_pixels", "height", "width"],
    "diffsynth.core.gradient:set_gradient_checkpointing": ["network", "enabled", "offload"],
    "diffsynth.trainers.text_to_image:launch_training_task": ["model", "args"],
    "diffsynth.trainers.text_to_image:add_general_parsers": ["parser"],
    "diffsynth.models.download:download_models": ["names"],
    "diffsynth.models.manager:ModelManager": ["torch_dtype", "device", "file_path_list"],
    "diffsynth.models.manager:ModelManager.load_lora": ["self", "path", "lora_alpha"],
    "diffsynth.models.loading:load_component": ["path_or_paths", "name", "torch_dtype", "device"],
    "diffsynth.pipelines.flux:FluxImagePipeline.from_pretrained": ["torch_dtype", "device", "model_configs"],
    "diffsynth.pipelines.flux:FluxImagePipeline.from_model_manager": ["model_manager"],
    "diffsynth.pipelines.flux:FluxImagePipeline.load_lora": ["self", "module", "path", "alpha", "hotload"],
    "diffsynth.pipelines.flux:FluxImagePipeline.clear_lora": ["self"],
}
"""Names that the pages print or users call -> the parameters that must come first, in this order."""

PUBLIC_HOSTS = re.compile(
    r"(www\.)?(apache\.org|arxiv\.org|github\.com|git-lfs\.github\.com|huggingface\.co|modelscope\.cn)|"
    r"127\.0\.0\.1|localhost|git-lfs")
"""Public hosts that texts may name; a host of one workplace may not stand in the repository."""
MACHINE_PATH = re.compile(r"(?<![\w.])/(work|home|root|mnt|Users)/\w+")
PRIVATE_INDEX = re.compile(r"--(extra-)?index-url|--find-links|--trusted-host")

@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def place(path: Path, node: ast.AST | None = None) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def module_parts(path: Path) -> tuple[str, ...]:
    """``diffsynth/core/random.py`` -> (diffsynth, core, random)."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported_modules(path: Path) -> Iterator[tuple[ast.AST, tuple[str, ...]]]:
    """Every module of this package that a file imports, at its top or inside functions, in parts."""
    here = module_parts(path)
    package = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node, tuple(alias.name.split("."))) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            # ``from . import random`` names a module, ``from .random import normal`` does not
            yield from ((node, (*module, alias.name)) for alias in node.names)


def test_imports_point_down():
    wrong = []
    for path in LIBRARY:
        if path == PACKAGE / "__init__.py":
            continue
        room = module_parts(path)[1]
        for node, module in imported_modules(path):
            if module[0] != "diffsynth" or len(module) < 2 or module[1] in (room, "__version__"):
                continue
            if module[1] not in MAY_IMPORT[room]:
                wrong.append(f"{place(path, node)}: {room} imports {'.'.join(module)}")
    assert not wrong, "\n".join(wrong)


def test_rooms_are_those_of_the_design():
    rooms = {module_parts(path)[1] for path in LIBRARY if len(module_parts(path)) > 1}
    assert rooms == set(MAY_IMPORT)


def test_heavy_libraries_are_imported_inside_functions():
    wrong = []
    for path in LIBRARY:
        for node in tree_of(path).body:  # the top of the file; TYPE_CHECKING blocks and functions lie deeper
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else [])
            wrong += [f"{place(path, node)}: {name}" for name in names if name.split(".")[0] in HEAVY]
    assert not wrong, "\n".join(wrong)


def test_importing_the_package_is_light():
    code = "import sys, diffsynth; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not set(loaded.split()) & {*HEAVY, "torch", "numpy", "pydantic"}


def words(identifier: str) -> list[str]:
    """``FluxImagePipeline``, ``FLUX_DIT`` and ``flux1-dev`` all hold the word ``flux``."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", identifier)]


def names_a_family(text: str, families: list[str]) -> bool:
    held = words(text)
    for family in map(words, families):
        if any(held[i : i + len(family)] == family for i in range(len(held) - len(family) + 1)):
            return True
    return False


def docstrings(tree: ast.Module) -> set[int]:
    return {id(node.value) for node in ast.walk(tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}


def texts_in(tree: ast.AST) -> Iterator[tuple[ast.Constant, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node, node.value


def identifiers(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree):
        for attribute in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(value := getattr(node, attribute, None), str):
                yield node, value


def family_mentions(path: Path) -> Iterator[str]:
    """Where code, not prose, names a family: in an identifier, or in a text without spaces (a key, a name, a path)."""
    families, tree = list(FAMILY_MODULES), tree_of(path)
    prose = docstrings(tree)
    for node, identifier in identifiers(tree):
        if names_a_family(identifier, families):
            yield f"{place(path, node)}: {identifier}"
    for node, text in texts_in(tree):
        if id(node) not in prose and not re.search(r"\s", text) and names_a_family(text, families):
            yield f"{place(path, node)}: {text!r}"


def test_no_family_is_named_outside_its_own_files():
    exempt = {PACKAGE / "__init__.py", PACKAGE / "models" / "registry.py"}
    wrong = []
    for path in LIBRARY:
        room = module_parts(path)[1:2]
        # shared components in models/ are named after the family that brought them; see the next test
        if path not in exempt and room not in (("pipelines",), ("models",)):
            wrong += family_mentions(path)
    assert not wrong, "\n".join(wrong)


def test_models_do_not_branch_on_a_family():
    wrong = []
    for path in (PACKAGE / "models").rglob("*.py"):
        for node in ast.walk(tree_of(path)):
            compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else (
                [node.value] if isinstance(node, ast.MatchValue) else [])
            texts = [text for part in compared for _, text in texts_in(part)]
            wrong += [f"{place(path, node)}: {text!r}" for text in texts if names_a_family(text, list(FAMILY_MODULES))]
    assert not wrong, "\n".join(wrong)


def test_families_do_not_import_each_other():
    files = {path: next((f for f in FAMILY_MODULES if path.stem == f or path.stem.startswith(f + "_")), None)
             for path in (PACKAGE / "pipelines").glob("*.py") if path.name != "__init__.py"}
    assert None not in files.values(), f"which family do these belong to? {files}"
    wrong = []
    for path, family in files.items():
        for node, module in imported_modules(path):
            if module[:2] == ("diffsynth", "pipelines") and not module[2].startswith(str(family)):
                wrong.append(f"{place(path, node)}: {'.'.join(module)}")
    assert not wrong, "\n".join(wrong)


def test_the_library_does_not_print():
    banned = ("print", "input", "breakpoint")
    wrong = [place(path, node) for path in LIBRARY for node in ast.walk(tree_of(path))
             if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in banned]
    assert not wrong, "\n".join(wrong)


def is_broad(kind: ast.expr | None) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(k is None or (isinstance(k, ast.Name) and k.id in ("Exception", "BaseException")) for k in kinds)


def test_no_exception_is_swallowed():
    wrong = []
    for path in LIBRARY:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ExceptHandler):
                does_nothing = all(
                    isinstance(statement, ast.Pass | ast.Continue | ast.Break)
                    or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
                    for statement in node.body
                )
                raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
                if does_nothing or (is_broad(node.type) and not raises):
                    wrong.append(place(path, node))
            if "suppress" in (getattr(node, "id", None), getattr(node, "attr", None)):
                wrong.append(place(path, node))
    assert not wrong, "\n".join(wrong)


def test_nothing_is_declared_twice_in_a_class():
    wrong = []
    for path in LIBRARY:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                fields = [statement.target.id for statement in node.body
                          if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)]
                twice = sorted({name for name in fields if fields.count(name) > 1})
                wrong += [f"{place(path, node)}: {node.name}.{name}" for name in twice]
    assert not wrong, "\n".join(wrong)


def test_public_names():
    import diffsynth

    assert sorted(diffsynth.__all__) == sorted(PUBLIC_NAMES)
    for name in PUBLIC_NAMES:
        assert getattr(diffsynth, name) is not None


@pytest.mark.parametrize("name", PAGES)
def test_names_of_the_pages(name):
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    first = PAGES[name]
    assert list(inspect.signature(found).parameters)[: len(first)] == first


def test_files_are_read_in_one_sitting():
    long = {place(path): count for path in ALL_CODE
            if (count := path.read_text(encoding="utf-8").count("\n")) > (400 if PACKAGE in path.parents else 450)}
    assert not long, "\n".join(f"{name}: {count} lines" for name, count in long.items())


def test_functions_fit_a_screen():
    long = []
    for path in ALL_CODE:
        if "data" in path.relative_to(ROOT).parts[:2]:  # recorded checkers, kept as they were received
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                # a documented __call__ is mostly its documentation
                if count > (80 if node.name == "__call__" or PACKAGE not in path.parents else 70):
                    long.append(f"{place(path, node)} {node.name}: {count} lines")
    assert not long, "\n".join(long)


def test_the_loop_stays_a_loop():
    tree = tree_of(PACKAGE / "diffusion" / "runner.py")
    loops = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert len(loops) == 1
    assert (loops[0].end_lineno or 0) - loops[0].lineno + 1 <= 60


def tracked_texts() -> Iterator[tuple[Path, str]]:
    """Every text file that is, or would be, in the repository."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, capture_output=True, cwd=ROOT, check=True)
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if not name or not path.is_file() or path.stat().st_size > 2_000_000:
            continue
        content = path.read_bytes()
        if b"\0" not in content:
            yield path, content.decode("utf-8", "replace")


def test_nothing_of_one_machine_is_in_the_repository():
    wrong = []
    for path, text in tracked_texts():
        for number, line in enumerate(text.splitlines(), 1):
            hosts = re.findall(r"https?://([\w.-]+)", line)
            found = [host for host in hosts if not PUBLIC_HOSTS.fullmatch(host)]
            found += [m.group() for m in MACHINE_PATH.finditer(line)]
            if path.suffix in (".lock", ".txt", ".toml", "") and path.name != "LICENSE":
                found += [m.group() for m in PRIVATE_INDEX.finditer(line)]
            wrong += [f"{path.relative_to(ROOT)}:{number}: {what}" for what in found]
    assert not wrong, "\n".join(wrong[:20])


def test_a_todo_names_its_condition():
    unclear = re.compile(r"\b(FIXME|XXX|HACK)\b|#.*\bTODO\b(?!.*\b(when|until|once|as soon as|after|if)\b)")
    wrong = [f"{place(path)[:-2]}:{number}" for path in ALL_CODE if path != Path(__file__)
             for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if unclear.search(line)]
    assert not wrong, "\n".join(wrong)


DEVICE_NAMES = re.compile(r"(cpu|cuda|mps)(:\d+)?")


def test_one_module_tells_devices_apart():
    """Elsewhere a device may be named, as in ``to("cpu")``, but nothing may depend on which one it is."""
    wrong = []
    for path in LIBRARY:
        if path == PACKAGE / "core" / "device.py":
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Compare | ast.match_case):
                parts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [node.pattern]
                compared = [text for part in parts for _, text in texts_in(part) if DEVICE_NAMES.fullmatch(text)]
                wrong += [f"{place(path, parts[0])}: compares with {text!r}" for text in compared]
            if isinstance(node, ast.Attribute) and node.attr in ("cuda", "mps", "backends", "xpu", "accelerator") and (
                    isinstance(node.value, ast.Name) and node.value.id == "torch"):
                wrong.append(f"{place(path, node)}: torch.{node.attr}")
    assert not wrong, "\n".join(wrong)


MODE = re.compile(r"[rwxa+bt]{1,3}")


def opens_text(call: ast.Call) -> bool:
    """Whether a call is ``open``, ``fdopen`` or a method of ``Path`` that reads or writes text."""
    name = getattr(call.func, "attr", None) or getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return True
    if name not in ("open", "fdopen"):
        return False
    of_a_path = isinstance(call.func, ast.Attribute) and name == "open"
    modes = [k.value for k in call.keywords if k.arg == "mode"] or call.args[0 if of_a_path else 1:][:1]
    texts = [text for mode in modes for _, text in texts_in(mode)]
    if of_a_path and modes and not (texts and MODE.fullmatch(texts[0])):
        return False  # Image.open, ZipFile.open and their like take something else first
    return not any("b" in text for text in texts)


def test_text_files_are_opened_with_their_encoding():
    """Where none is stated, Windows takes the code page of the country."""
    wrong = []
    for path in ALL_CODE:
        if path.relative_to(ROOT).parts[0] == "tests":
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and opens_text(node) and "encoding" not in {k.arg for k in node.keywords}:
                wrong.append(f"{place(path, node)}: {ast.unparse(node)[:80]}")
    assert not wrong, "\n".join(wrong)
