"""Every test here that asks for ``family`` runs once per family; the suite ends with a table, promise by family."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.pictures import make_dataset

from .families import FAMILIES
from .tiny import FamilyAtWork, TinyFamily


def tiny_families() -> list[TinyFamily]:
    return [importlib.import_module(module).TINY for module in FAMILIES]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        promise = promise_of(metafunc.module.__name__)
        marked = [
            pytest.param(tiny, id=tiny.name, marks=(
                [pytest.mark.skip(reason=tiny.abstains[promise])] if promise in tiny.abstains else []))
            for tiny in tiny_families()
        ]
        metafunc.parametrize("family", marked, indirect=True, scope="session")


def promise_of(name: str) -> str:
    """``tests.contract.test_resume`` and ``tests/contract/test_resume.py`` -> ``resume``."""
    return name.removesuffix(".py").replace("/", ".").rpartition(".")[2].removeprefix("test_")


@pytest.fixture(scope="session")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FamilyAtWork:
    """A family with tiny networks, made once per session."""
    tiny: TinyFamily = request.param
    return FamilyAtWork(tiny, tmp_path_factory.mktemp(tiny.name))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of two sizes with captions of different lengths; not to be changed."""
    return make_dataset(tmp_path_factory.mktemp("pictures") / "data", count=6, sizes=[(64, 48), (48, 64)])
