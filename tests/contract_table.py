"""The table at the end of a test run: cases of the contract suite by promise and family."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

NOT_BY_FAMILY = "all families"
_CASE = re.compile(r"tests/contract/test_(?P<promise>\w+)\.py::[^\[]+(\[(?P<parameters>.*)\])?")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from tests.contract.conftest import tiny_families

    names = [tiny.name for tiny in tiny_families()]
    counts: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.getreports(outcome):
            match = _CASE.match(report.nodeid)
            if match:
                parameters = (match["parameters"] or "").split("-")
                family = next((name for name in names if name in parameters), NOT_BY_FAMILY)
                counts[match["promise"], family][outcome] += 1
    if not counts:
        return
    columns = [*names, NOT_BY_FAMILY]
    promises = sorted({promise for promise, _ in counts})
    terminalreporter.section("contract suite: promise by family (cases passed)")
    terminalreporter.write_line("".join([f"{'promise':<16}", *(f"{column:>16}" for column in columns)]))
    for promise in promises:
        cells = [_cell(counts.get((promise, column), {})) for column in columns]
        terminalreporter.write_line("".join([f"{promise:<16}", *(f"{cell:>16}" for cell in cells)]))
    for tiny in tiny_families():
        for promise, reason in tiny.abstains.items():
            terminalreporter.write_line(f"{tiny.name} takes no part in {promise}: {reason}")


def _cell(counts: dict[str, int]) -> str:
    parts = [f"{counts[name]} {name}" for name in ("failed", "skipped") if counts.get(name)]
    return ", ".join([str(counts.get("passed", 0) or "-"), *parts])
