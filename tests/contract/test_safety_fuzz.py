"""Promise 10, of whatever else there may be: readers take any bytes, and refuse in words what they refuse."""

from __future__ import annotations

import ast
import json
import random
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import fuzz_targets

pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, about the damage that is meant


@pytest.mark.parametrize("target", fuzz_targets.TARGETS)
def test_readers_survive_mutations_of_the_corpus(target: str) -> None:
    """Only a ``UserError`` comes out; ``benchmarks/fuzz.py`` does the same a million times."""
    fuzz_targets.scratch()
    draw, pool = random.Random(0), fuzz_targets.corpus(target)
    accepted = sum(fuzz_targets.run_one(target, data) for data in pool)
    slowest = 0.0
    for _ in range(2000):
        start = time.process_time()
        accepted += fuzz_targets.run_one(target, fuzz_targets.mutate(draw.choice(pool), draw.choice(pool), draw))
        slowest = max(slowest, time.process_time() - start)
    assert accepted > 20, "most inputs are refused at once: they test nothing"
    assert slowest < 1


@given(st.binary(max_size=300), st.sampled_from(sorted(fuzz_targets.TARGETS)))
@settings(max_examples=300, deadline=None)
def test_readers_take_any_bytes(data: bytes, target: str) -> None:
    fuzz_targets.run_one(target, data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12,
)


@given(JSON)
@settings(max_examples=200, deadline=None)
def test_readers_take_any_json(value: Any) -> None:
    text = json.dumps(value).encode()
    for target, before in (("header", b"\x01\x00"), ("metadata", b"\x01"), ("metadata", b"\x02"), ("options", b"\x01")):
        with warnings.catch_warnings():
            fuzz_targets.run_one(target, before + text)


DOORS = {
    "torch.load": {"core/loader/pickles.py"}, "pickle.load": set(), "pickle.loads": set(), "eval": set(), "exec": set(),
    "yaml.load": set(), "yaml.unsafe_load": set(), "np.load": set(), "os.system": set(),
    "Image.open": {"core/data/image_file.py", "core/picture_file.py", "diffusion/contact_sheet.py"},
}
"""Calls that open what may be foreign, and the files in which they may stand."""


def test_there_is_no_other_door() -> None:
    package = Path(__file__).parents[2] / "diffsynth"
    wrong = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in DOORS:
                name = ast.unparse(node.func)
                place = path.relative_to(package).as_posix()
                text = ast.unparse(node)
                if place not in DOORS[name] or (name == "torch.load" and "weights_only=True" not in text) or (
                        name == "Image.open" and "formats=" not in text):
                    wrong.append(f"{place}:{node.lineno}: {text}")
    assert not wrong, "\n".join(wrong)
