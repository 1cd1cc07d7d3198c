"""Stop a tiny run in every way, resume it, and compare its end with that of the run that was never stopped.

    python benchmarks/crash.py --kills 200 --full_disk 20 --sigterm 20

Every run is a process of its own, forked from this one (which has imported everything), and really killed: SIGKILL at
random moments, a third of them inside a save, some twice in a row; SIGTERM; writes that fail because a limit of the
system is reached. Compared are the bytes of the final weights, optimizer, average (EMA), metrics and state.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from diffsynth.diffusion.checkpoint import verify_state  # noqa: E402
from tests.contract.conftest import tiny_families  # noqa: E402
from tests.contract.forked import Forked  # noqa: E402
from tests.contract.tiny import FamilyAtWork, metrics  # noqa: E402
from tests.pictures import make_dataset  # noqa: E402

OPTIONS: dict[str, Any] = dict(
    num_epochs=4, save_steps=1, caption_dropout=0.3, lr_scheduler="cosine", gradient_accumulation_steps=2,
    ema_decay=0.9, keep_checkpoints=2)
LAST = 12
RETRY = 40
"""Attempts to hit a moment, such as the inside of a save, before a case is given up."""


class Crashes:
    """One family, the straight run, and every run that is compared with it."""

    def __init__(self, family: FamilyAtWork, folder: Path, seed: int) -> None:
        self.family, self.folder, self.chance = family, folder, random.Random(seed)
        self.data = make_dataset(folder / "pictures", count=6, sizes=[(64, 48), (48, 64)])
        self.counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self.failures: list[str] = []
        # in this process first: it imports everything, fills the cache, and the forks start at once
        family.train(self.data, folder / "first", cache_path=str(folder / "cache"), **OPTIONS)
        started, whole = time.monotonic(), self.start(folder / "whole")
        assert whole.wait() == 0, whole.said()
        self.duration_s = time.monotonic() - started
        self.expected = final_bytes(folder / "whole")

    def start(self, output: Path) -> Forked:
        return Forked(functools.partial(
            self.family.train, self.data, output, resume="auto", cache_path=str(self.folder / "cache"), **OPTIONS))

    def case(self, kind: str, number: int) -> None:
        output = self.folder / f"{kind} {number}"
        for _ in range(RETRY):
            stopped = getattr(self, f"stop_{kind}")(output)
            self.count_unreadable(kind, output)
            if stopped:
                break
        else:
            self.failures.append(f"{output.name}: could not be stopped as wanted in {RETRY} attempts")
        if self.chance.random() < 0.2:  # a second one before anything new was saved
            self.counts[kind]["twice in a row"] += 1
            process = self.start(output)
            time.sleep(self.chance.uniform(0, 0.3) * self.duration_s)
            process.send(signal.SIGKILL)
            process.wait()
            self.count_unreadable(kind, output)
        self.resume(kind, output)

    def resume(self, kind: str, output: Path) -> None:
        process = self.start(output)
        code = process.wait()
        different = ["exit code"] if code else [
            name for name, content in self.expected.items() if final_bytes(output).get(name) != content]
        self.counts[kind]["runs"] += 1
        self.counts[kind]["equal"] += not different
        if different:
            self.failures.append(f"{output.name}: {different} ({process.said().strip().splitlines()[-1:]})")
        else:
            shutil.rmtree(output)

    def stop_random(self, output: Path) -> bool:
        """SIGKILL at any moment, from the first import of the run to its end."""
        process = self.start(output)
        time.sleep(self.chance.uniform(0, self.duration_s))
        process.send(signal.SIGKILL)
        code = process.wait()
        self.counts["random"]["of them inside a save by chance"] += is_inside_a_save(output)
        if code == 0:
            shutil.rmtree(output)  # too late: the run was complete
        return code != 0

    def stop_saving(self, output: Path) -> bool:
        """SIGKILL while a weight file or a state is being written."""
        saves = self.chance.randint(1, LAST - 1)
        part = self.chance.choice(
            (".step-*.tmp", "state/.step-*", "state/.step-*/*.safetensors", "state/.step-*/manifest*"))
        delay_s = self.chance.uniform(0, 0.004)
        process = self.start(output)
        process.send_when(signal.SIGKILL, lambda: len(metrics_lines(output)) >= saves and any(output.glob(part))
                          and time.sleep(delay_s) is None)
        code = process.wait()
        inside = is_inside_a_save(output)
        if code == 0:
            shutil.rmtree(output)
        return code != 0 and inside

    def stop_sigterm(self, output: Path) -> bool:
        """SIGTERM at any moment in which the loop runs."""
        process = self.start(output)
        delay_s = self.chance.uniform(0, 0.6 * self.duration_s)
        process.send_when(signal.SIGTERM, lambda: (output / "metrics.jsonl").exists() and time.sleep(delay_s) is None)
        code = process.wait()
        if code == 0:
            shutil.rmtree(output)
            return False
        self.counts["sigterm"]["exit code 4"] += code == 4
        if code != 4 or not verify_state(output / "state" / f"step-{len(metrics(output))}"):
            self.failures.append(f"{output.name}: exit code {code}, {process.said().strip().splitlines()[-1:]}")
        return True

    def stop_full_disk(self, output: Path) -> bool:
        """From some moment on no file can grow beyond a size: real writes fail."""
        process = self.start(output)
        saves, limit = self.chance.randint(0, LAST - 2), self.chance.choice((300, 3_000, 30_000, 60_000))
        while process.poll() is None:
            if len(metrics_lines(output)) >= saves:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                break
            time.sleep(0.001)
        code = process.wait()
        if code == 0:
            shutil.rmtree(output)
            return False
        self.counts["full_disk"]["exit code 2"] += code == 2
        if code != 2 or "error: cannot" not in process.said():
            self.failures.append(f"{output.name}: exit code {code}, {process.said().strip().splitlines()[-1:]}")
        return True

    def count_unreadable(self, kind: str, output: Path) -> None:
        """States and weight files under their final names, which must be whole whatever happened."""
        from safetensors.torch import load_file

        for folder in (output / "state").glob("step-*"):
            if not verify_state(folder):
                self.counts[kind]["unreadable"] += 1
                self.failures.append(f"{folder} does not verify")
            self.counts[kind]["checkpoints looked at"] += 1
        for path in output.glob("step-*.safetensors"):
            load_file(path)  # raises
            self.counts[kind]["checkpoints looked at"] += 1


def metrics_lines(output: Path) -> list[str]:
    path = output / "metrics.jsonl"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def is_inside_a_save(output: Path) -> bool:
    """Whether a killed run left something half written."""
    return any(output.glob(".step-*")) or any((output / "state").glob(".step-*"))


def final_bytes(output: Path) -> dict[str, bytes]:
    state = output / "state" / f"step-{LAST}"
    names = ["metrics.jsonl", f"step-{LAST}.safetensors", f"step-{LAST}-ema.safetensors",
             *(f"state/step-{LAST}/{name}.safetensors" for name in ("weights", "optimizer", "ema"))]
    found = {name: (output / name).read_bytes() for name in names if (output / name).exists()}
    if (state / "state.json").exists():
        document = json.loads((state / "state.json").read_text(encoding="utf-8"))
        kept = ("progress", "optimizer", "lr_scheduler", "ema_updates", "monitors")
        found["state"] = json.dumps([document[name] for name in kept]).encode()
    found["names"] = str(sorted(path.name for path in output.rglob("*"))).encode()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("kills", 200), ("full_disk", 20), ("sigterm", 20), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--family", default=tiny_families()[0].name)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "crash.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tiny = next(tiny for tiny in tiny_families() if tiny.name == args.family)
    saving = -(-args.kills // 3)
    kinds = (["saving"] * saving + ["random"] * (args.kills - saving) + ["full_disk"] * args.full_disk
             + ["sigterm"] * args.sigterm)
    with tempfile.TemporaryDirectory() as temporary:
        folder, started = Path(temporary), time.monotonic()
        crashes = Crashes(FamilyAtWork(tiny, folder / "networks"), folder, args.seed)
        for number, kind in enumerate(kinds):
            crashes.case(kind, number)
            if sys.stderr.isatty() or number % 20 == 19:
                print(f"{number + 1} of {len(kinds)}, {len(crashes.failures)} failures", file=sys.stderr, flush=True)
        seconds = time.monotonic() - started
    columns = ("runs", "equal", "unreadable", "checkpoints looked at", "twice in a row")
    print(f"{'':<12}" + "".join(f"{column:>24}" for column in columns))
    for kind in dict.fromkeys(kinds):
        print(f"{kind:<12}" + "".join(f"{crashes.counts[kind][column]:>24}" for column in columns))
    for kind, counts in crashes.counts.items():
        for name in set(counts) - set(columns):
            print(f"{kind}: {name}: {counts[name]}")
    print(f"{seconds:.0f} s, straight run {crashes.duration_s:.2f} s", *crashes.failures, sep="\n")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(
        {"arguments": vars(args) | {"results": str(args.results)}, "counts": crashes.counts, "seconds": seconds,
         "failures": crashes.failures}, indent=1), encoding="utf-8")
    return 1 if crashes.failures else 0


if __name__ == "__main__":
    sys.exit(main())
