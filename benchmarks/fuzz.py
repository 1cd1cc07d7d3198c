"""Feeds a reader random input, a million times by default; only a ``UserError`` may come out, and within a second.

    python benchmarks/fuzz.py --target header --count 1000000
    python benchmarks/fuzz.py --target metadata --guided --keep /tmp/found
    python benchmarks/fuzz.py --target metadata --add /tmp/found

``--guided`` needs ``atheris`` (``pip install 'diffsynth[fuzz]'``): inputs that reach new code are kept and changed
further. Without it, the inputs of ``tests/data/fuzz`` are changed at random. What fails is written to
``benchmarks/results/fuzz`` and can be given back with ``--again FILE``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
SLOW_S = 1.0
GROWTH_MIB = 200
WARM_UP = 20_000


class Fuzzer:
    """Counts executions, times each, and keeps one input for each kind of failure."""

    def __init__(self, target: str, count: int, results: Path) -> None:
        from tests import fuzz_targets

        fuzz_targets.quiet()
        self.run_one, self.target, self.count = fuzz_targets.run_one, target, count
        self.results = results
        self.done = self.accepted = self.slowest_us = 0
        self.failures: dict[str, Path] = {}
        self.start = time.perf_counter()
        self.warm_mib = 0
        signal.signal(signal.SIGPROF, _too_long)

    def execute(self, data: bytes) -> None:
        begin = time.process_time()  # of this process: others may keep the machine busy
        signal.setitimer(signal.ITIMER_PROF, 10 * SLOW_S)
        try:
            self.accepted += self.run_one(self.target, data)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001
            self._fail(_kind(error), data)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = time.process_time() - begin
        self.slowest_us = max(self.slowest_us, int(seconds * 1e6))
        if seconds > SLOW_S:
            self._fail(f"slow: {seconds:.1f} s", data)
        self.done += 1
        if self.done == WARM_UP:
            self.warm_mib = _peak_mib()
        if self.done >= self.count:
            self.finish()

    def _fail(self, kind: str, data: bytes) -> None:
        if kind not in self.failures:
            self.results.mkdir(parents=True, exist_ok=True)
            path = self.results / hashlib.sha1(data).hexdigest()[:12]
            path.write_bytes(data)
            self.failures[kind] = path
            print(f"failure: {kind}: {path}", flush=True)

    def finish(self) -> None:
        seconds = time.perf_counter() - self.start
        growth = _peak_mib() - self.warm_mib if self.warm_mib else 0
        if growth > GROWTH_MIB:
            self.failures["memory"] = self.results
        print(json.dumps({
            "target": self.target, "executions": self.done, "seconds": round(seconds, 1),
            "per_second": round(self.done / seconds), "accepted": self.accepted, "slowest_us": self.slowest_us,
            "growth_mib": growth, "failures": sorted(self.failures),
        }), flush=True)
        from tests.fuzz_targets import scratch

        shutil.rmtree(scratch(), ignore_errors=True)
        os._exit(1 if self.failures else 0)  # libFuzzer takes any other end for a failure


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("an input took ten seconds")


def _kind(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "diffsynth" in frame.filename] or list(frames)
    return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}: {str(error)[:80]!r}"


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def random_mutations(fuzzer: Fuzzer, seed: int) -> None:
    from tests.fuzz_targets import corpus, mutate

    draw = random.Random(seed)
    pool = corpus(fuzzer.target)
    for data in pool:
        fuzzer.execute(data)
    while True:
        fuzzer.execute(mutate(draw.choice(pool), draw.choice(pool), draw))


def guided(args: argparse.Namespace, results: Path) -> None:
    """libFuzzer through atheris; what reaches new lines is kept in a folder, and put into ``--keep`` where asked."""
    import atheris

    with atheris.instrument_imports(include=["diffsynth", "yaml"]):
        fuzzer = Fuzzer(args.target, args.count, results)
    from tests.fuzz_targets import MAX_INPUT, corpus

    results.mkdir(parents=True, exist_ok=True)
    found = Path(args.keep or tempfile.mkdtemp(prefix="diffsynth-corpus-"))
    found.mkdir(parents=True, exist_ok=True)
    for data in corpus(args.target):
        (found / hashlib.sha1(data).hexdigest()[:12]).write_bytes(data)
    atheris.Setup([sys.argv[0], f"-max_len={min(MAX_INPUT, 4096)}", f"-seed={args.seed}", "-rss_limit_mb=0",
                   "-timeout=60",
                   f"-runs={args.count + 1000}", "-verbosity=0", f"-artifact_prefix={results}/",
                   str(found)],
                  fuzzer.execute)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, choices=("header", "metadata", "lora_keys", "options"))
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guided", action="store_true", help="Guided by coverage; needs atheris.")
    parser.add_argument("--keep", help="Folder for inputs that reach new code.")
    parser.add_argument("--add", type=Path, help="Put the inputs of this folder into the checked-in corpus.")
    parser.add_argument("--again", type=Path, help="One input that failed before.")
    args = parser.parse_args()
    results = ROOT / "benchmarks" / "results" / "fuzz" / args.target
    if args.again:
        from tests.fuzz_targets import run_one

        print("accepted" if run_one(args.target, args.again.read_bytes()) else "refused")
    elif args.add:
        from tests.fuzz_targets import add_to_corpus

        print(add_to_corpus(args.target, [path.read_bytes() for path in args.add.iterdir()]), "bytes")
    elif args.guided:
        guided(args, results)
    else:
        random_mutations(Fuzzer(args.target, args.count, results), args.seed)


if __name__ == "__main__":
    main()
