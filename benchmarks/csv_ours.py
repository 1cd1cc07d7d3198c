"""Opening the same csv file as a ``UnifiedDataset``; the imports before it are not counted."""

from __future__ import annotations

import time

from make_models import DATA
from measure import METER, Case, resident_mb, resident_peak_mb

from diffsynth.core.data import UnifiedDataset


def run(case: Case) -> None:
    folder = DATA / "csv"
    operator = UnifiedDataset.default_image_operator(base_path=str(folder), height=256, width=256)
    memory_mb, started_s = resident_mb(), time.process_time()
    dataset = UnifiedDataset(str(folder), str(folder / "metadata.csv"), 1, "image", operator)
    METER.extra.update(open_s=time.process_time() - started_s, open_mb=resident_mb() - memory_mb, rows=len(dataset))
    assert dataset.row(199_999)["prompt"]
    METER.extra["peak_mb"] = resident_peak_mb() - memory_mb
