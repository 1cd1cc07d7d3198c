"""The floor of opening a data set: the rows of a csv file in a list, by the standard library."""

from __future__ import annotations

import csv
import time

from make_models import DATA
from measure import METER, Case, resident_mb


def run(case: Case) -> None:
    memory_mb, started_s = resident_mb(), time.process_time()
    with (DATA / "csv" / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    METER.extra.update(open_s=time.process_time() - started_s, open_mb=resident_mb() - memory_mb, rows=len(rows) - 1)
