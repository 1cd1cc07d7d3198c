"""Prints what is encoded again when one thing is changed, counted on the tiny networks of the contract tests.

    python benchmarks/cache_table.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.contract.cache_changes import CHANGES, Case, encodings, units_of
from tests.contract.conftest import tiny_families
from tests.contract.tiny import FamilyAtWork
from tests.pictures import make_dataset


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = make_dataset(folder / "pictures", count=6, sizes=[(64, 48), (48, 64)])
        for tiny in tiny_families():
            family = FamilyAtWork(tiny, folder / tiny.name / "models")
            cache = folder / tiny.name / "cache"
            with encodings() as first:
                start = Case(family, pictures, folder / tiny.name / "start", cache)
                start.fill()
            units = [type(unit).__name__ for unit, _ in units_of(family)]
            print(f"{tiny.name}: six pictures with six captions, 32 x 32, are in the cache; then one thing is changed")
            print(f"{'':<36}", *(f"{unit:>20}" for unit in units))
            print(f"{'an empty cache':<36}", *(f"{first[unit]:>20}" for unit in units))
            for number, change in enumerate(CHANGES):
                case = Case(family, pictures, folder / tiny.name / str(number), cache)
                change.apply(case)
                with encodings() as counts:
                    case.fill()
                print(f"{change.name:<36}", *(f"{counts[unit]:>20}" for unit in units))


if __name__ == "__main__":
    main()
