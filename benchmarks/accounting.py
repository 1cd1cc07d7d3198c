"""Many random data sets through the accounting property: found = trained + left out, every item once an epoch.

``python benchmarks/accounting.py --count 10000`` prints how many cases there were, how many failed, what they held, and
how long they took. A case that fails is named by its number, from which all of it follows.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def run_one(folder: Path, number: int) -> tuple[int, str, dict[str, int]]:
    """The case's number, the traceback of its failure ("" for none), and what it held."""
    from tests.contract.random_datasets import run_case

    logging.disable(logging.CRITICAL)  # damaged files are warned of, and here they are the point
    place = folder / str(number)
    try:
        case = run_case(number, place)
    except Exception:  # noqa: BLE001, counted and printed
        return number, traceback.format_exc(), {}
    finally:
        shutil.rmtree(place, ignore_errors=True)
    held = Counter(row.kind.removeprefix("_") for row in case.rows)
    held["rows"] = len(case.rows)
    held["rows that cannot be used"] = sum(row.wrong is not None for row in case.rows)
    held["files that vanish"] = case.vanishes is not None
    return number, "", dict(held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    begin, held, failures = time.perf_counter(), Counter(), []
    with tempfile.TemporaryDirectory() as folder, \
            multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        numbers = range(options.first, options.first + options.count)
        for number, failure, counts in pool.imap_unordered(partial(run_one, Path(folder)), numbers, chunksize=16):
            held.update(counts)
            if failure:
                failures.append(number)
                print(f"case {number}:\n{failure}")
    print(json.dumps({"cases": options.count, "failures": len(failures), "failed": failures[:20],
                      "seconds": round(time.perf_counter() - begin, 1), "held": dict(held.most_common())}, indent=2))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
