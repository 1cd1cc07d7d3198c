"""Our training beside the bare-torch floor, as ratios: ``make bench``, or ``python benchmarks/run.py --help``.

Every run is a process of its own with one compute thread; floor and ours alternate, so that a busy machine slows both.
The least of several rounds counts: neighbours on the machine take caches and cores away, they never give time back.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from make_models import DATA, make_all
from measure import Case

HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What ours may cost at most."""

    step_ratio: float = 1.05
    first_step_s: float = 5.5
    memory_ratio: float = 1.10
    csv_s: float = 0.5
    csv_mb: float = 100.0


GOAL = Goal()
CASES = {
    "flux256": dict(resolution=256, batch_size=1, num_steps=23),
    "flux256b4": dict(resolution=256, batch_size=4, num_steps=11),
    "flux256gc": dict(resolution=256, batch_size=1, num_steps=13, use_gradient_checkpointing=True),
    "csv": {},
}
DEFAULT_CASES = ("flux256", "flux256b4", "csv")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(DEFAULT_CASES))
    parser.add_argument("--rounds", type=int, default=3, help="How often floor and ours are run in turn.")
    options = parser.parse_args(arguments)
    make_all()
    shutil.rmtree(RESULTS, ignore_errors=True)
    RESULTS.mkdir(parents=True)
    tables = [run_case(name, options.rounds) for name in options.cases]
    report = "\n\n".join(tables) + "\n"
    (RESULTS / "report.md").write_text(report, encoding="utf-8")
    print("\n" + report)
    return 1 if "missed" in report else 0


def run_case(name: str, rounds: int) -> str:
    """Run floor and ours in turn and return the table of what came out."""
    prefix = "csv_" if name == "csv" else ""
    if not prefix:
        _measure(name, "ours", 0, {**CASES[name], "num_steps": 1})  # fills the cache; not counted
    results: dict[str, list[dict[str, Any]]] = {"floor": [], "ours": []}
    for number in range(1, rounds + 1):
        for contestant, found in results.items():
            found.append(_measure(name, prefix + contestant, number, CASES[name]))
    return _csv_table(results) if prefix else _step_table(name, results)


def _measure(name: str, contestant: str, number: int, settings: dict[str, Any]) -> dict[str, Any]:
    tag = f"{name}-{contestant}-{number}"
    output = DATA / "output" / tag
    shutil.rmtree(output, ignore_errors=True)
    case = Case(contestant=contestant, output=str(output), **settings)
    result = RESULTS / f"{tag}.json"
    environment = dict(
        os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )
    with (RESULTS / f"{tag}.log").open("w", encoding="utf-8") as log:
        finished = subprocess.run(
            [sys.executable, str(HERE / "measure.py"), json.dumps(asdict(case)), str(result)],
            stdout=log, stderr=subprocess.STDOUT, env=environment, check=False,
        )
    shutil.rmtree(output, ignore_errors=True)
    if finished.returncode:
        raise SystemExit(f"{tag} failed; see {log.name}")
    measured = json.loads(result.read_text(encoding="utf-8"))
    print(f"{tag}: step {measured['step_s'] or 0:.3f} CPU s, whole run {measured['total_s']:.1f} CPU s, "
          f"peak {measured['peak_mb']:.0f} MB", flush=True)
    return measured


def _step_table(name: str, results: dict[str, list[dict[str, Any]]]) -> str:
    rows = ["| run | CPU s per step (median) | mean, with checkpoints | CPU s to the first step | "
            "peak MB, steps | peak MB, end | trainable |", "|---|---|---|---|---|---|---|"]
    for contestant, found in results.items():
        for run in found:
            rows.append(
                f"| {contestant} | {run['step_s']:.3f} | {run['mean_step_s']:.3f} | {run['first_step_s']:.2f} | "
                f"{run['steps_peak_mb']:.0f} | {run['peak_mb']:.0f} | "
                f"{run['num_trainable']} {','.join(run['trainable_dtypes'])} |")
    floor, ours = ({key: min(run[key] for run in found) for key in ("step_s", "first_step_s", "peak_mb")}
                   for found in results.values())
    rows += ["", _verdict("step", ours["step_s"] / floor["step_s"], GOAL.step_ratio, "x the floor"),
             _verdict("peak memory", ours["peak_mb"] / floor["peak_mb"], GOAL.memory_ratio, "x the floor")]
    if name == "flux256":
        # with more pictures in it the first step itself takes longer than the limit
        rows.append(_verdict("first step", ours["first_step_s"], GOAL.first_step_s, "CPU s"))
    return "\n".join([f"### {name}: {CASES[name]}", "", *rows])


def _csv_table(results: dict[str, list[dict[str, Any]]]) -> str:
    rows = ["| reader | CPU s to open | MB kept | rows |", "|---|---|---|---|"]
    for contestant, found in results.items():
        for run in found:
            extra = run["extra"]
            rows.append(f"| {contestant} | {extra['open_s']:.3f} | {extra['open_mb']:.0f} | {extra['rows']} |")
    extras = [run["extra"] for run in results["ours"]]
    rows += ["", _verdict("open", min(extra["open_s"] for extra in extras), GOAL.csv_s, "CPU s"),
             _verdict("memory at its peak", max(extra["peak_mb"] for extra in extras), GOAL.csv_mb, "MB")]
    return "\n".join(["### csv: a table of 200,000 rows", "", *rows])


def _verdict(what: str, value: float, limit: float, unit: str) -> str:
    return f"- {what}: {value:.3f} {unit}, goal at most {limit}: {'reached' if value <= limit else 'missed'}"


if __name__ == "__main__":
    sys.exit(main())
