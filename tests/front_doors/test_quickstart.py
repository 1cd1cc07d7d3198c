"""``make quickstart``, with fewer steps."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from .conftest import REPOSITORY

SCRIPTS = [path for room in ("examples", "benchmarks") for path in sorted((REPOSITORY / room).rglob("*.py"))]


def imported_names(path: Path) -> Iterator[tuple[str, str]]:
    """What a script takes from this package, as (module, name)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "diffsynth":
            yield from ((str(node.module), alias.name) for alias in node.names)


def test_quickstart_trains_and_draws_before_and_after(workplace):
    finished = workplace.python(
        str(REPOSITORY / "examples/quickstart/quickstart.py"), "--steps", "2", "--output_path", "quickstart")
    names = {path.name for path in (workplace.folder / "quickstart").iterdir()}
    assert {"before_after.png", "loss_curve.png", "step-2.safetensors", "metrics.jsonl"} <= names
    assert "generate --model_paths" in finished.stdout


def test_scripts_import_only_what_exists():
    wrong = []
    for path in SCRIPTS:
        for module, name in imported_names(path):
            found = importlib.import_module(module)
            is_module = hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{name}") is not None
            if not (hasattr(found, name) or is_module):
                wrong.append(f"{path.relative_to(REPOSITORY)}: {module}.{name}")
    assert not wrong, "\n".join(wrong)
