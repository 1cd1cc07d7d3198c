"""One-letter typos of every option of every command: how many are refused, how many with the right first suggestion.

python benchmarks/typos.py [--count TYPOS_PER_OPTION] [--show]
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffsynth.core.command_line import read_command_line
from diffsynth.core.errors import UserError
from tests.contract.schemas import sampled_typos, schemas, typed_names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10**9, help="typos of each option; default all of them")
    parser.add_argument("--show", action="store_true", help="list the typos that were answered with another option")
    given = parser.parse_args()
    total: Counter[str] = Counter()
    print(f"{'options of':<22}{'options':>8}{'typos':>8}{'refused':>9}{'right first':>13}")
    for title, options in schemas().items():
        found: Counter[str] = Counter()
        names = typed_names(options)
        for name in names:
            for typo in sampled_typos(name, given.count):
                if typo in names:
                    continue  # another option's own name
                found["typos"] += 1
                try:
                    read_command_line(options, [f"--{typo}", "1"])
                except UserError as error:
                    found["refused"] += 1
                    right = f"Did you mean --{name}?" in str(error)
                    found["right"] += right
                    if given.show and not right:
                        print(f"    --{typo} ({name}): {error}")
        found["options"] = len(names)
        total += found
        _row(title, found)
    _row("all", total)


def _row(title: str, found: Counter[str]) -> None:
    share = 100 * found["right"] / max(1, found["typos"])
    print(f"{title:<22}{found['options']:>8}{found['typos']:>8}{found['refused']:>9}{share:>12.2f}%")


if __name__ == "__main__":
    main()
