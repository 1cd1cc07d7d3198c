"""Break the code on purpose, one promise at a time, and see that a test notices.

    python benchmarks/breaks.py

Each break is a change of one line in a copy of this checkout; the test that must fail is run there before and after.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Break:
    """One mistake: what stands in the code, what is put in its place, and the test that sees it."""

    name: str
    file: str
    old: str
    new: str
    test: str


BREAKS = (
    Break(
        "alpha dropped on save", "diffsynth/adapters/formats.py",
        'if fmt in ("kohya", "comfyui"):\n                tensors[name + ".alpha"]',
        'if fmt in ():\n                tensors[name + ".alpha"]',
        "tests/contract/test_adapters.py"),
    Break(
        "generator streamed instead of keyed", "diffsynth/core/random.py",
        'return torch.Generator("cpu").manual_seed(keyed_seed(seed, *key))', "return torch.default_generator",
        "tests/contract/test_processes.py"),
    Break(
        "last batch dropped", "diffsynth/core/data/batching.py",
        "        windows.append(pooled[num_full:])", "        pass",
        "tests/contract/test_accounting.py"),
    Break(
        "timestep cast to bf16", "diffsynth/diffusion/schedule.py",
        "return NoiseLevels(1000 * sigmas, sigmas, sampling.weights(sigmas))",
        "return NoiseLevels((1000 * sigmas).bfloat16(), sigmas, sampling.weights(sigmas))",
        "tests/contract/test_recipe.py"),
    Break(
        "mask ignored (here: prompts padded by their neighbours)", "diffsynth/pipelines/flux.py",
        'tokenizer(prompts, padding="max_length", max_length=length',
        'tokenizer(prompts, padding="longest", max_length=length',
        "tests/contract/test_processes.py"),
    Break(
        "schedule stepped per process", "diffsynth/diffusion/runner.py",
        "            task.lr_scheduler.step()\n",
        "            for _ in range(task.accelerator.num_processes):\n                task.lr_scheduler.step()\n",
        "tests/contract/test_processes.py"),
    Break(
        "cache key without the VAE", "diffsynth/diffusion/cache_keys.py",
        'return f"{pipe.component_fingerprints[name]}|',
        'return "" if name == "vae" else f"{pipe.component_fingerprints[name]}|',
        "tests/contract/test_cache.py"),
    Break(
        "manifest written first", "diffsynth/diffusion/checkpoint.py",
        '    partial.mkdir(parents=True)\n    tensors, scalars',
        '    partial.mkdir(parents=True)\n    _write_file(partial / "manifest.json", {"weights.safetensors": {}})\n'
        '    tensors, scalars',
        "tests/unit/diffusion/test_checkpoint.py"),
)
"""Those that the contract suite has to notice.

Text is not masked in the first family, which pads its prompts to one length; there the mistake is another length."""


def copy_of_the_checkout(folder: Path) -> Path:
    """Every file that is, or would be, in the repository."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=REPOSITORY, check=True,
                            capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        source = REPOSITORY / name
        if source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, folder / name)
    return folder


def passes(test: str, checkout: Path) -> tuple[bool, str]:
    """Whether a test passes in a checkout, and the last lines that pytest says."""
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test], cwd=checkout, check=False,
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"})
    if finished.returncode not in (0, 1):
        raise SystemExit(f"{test}: pytest did not run\n{finished.stdout[-2000:]}{finished.stderr[-2000:]}")
    seen = [line for line in finished.stdout.splitlines() if line.startswith(("E  ", "FAILED"))]
    return finished.returncode == 0, (seen[0] if seen else "").removeprefix("E").strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a break's name")
    chosen = [entry for entry in BREAKS if parser.parse_args().only in entry.name]
    table = Table("break", "test", "as it is", "broken", "what the test says")
    with tempfile.TemporaryDirectory() as temporary:
        checkout = copy_of_the_checkout(Path(temporary))
        unnoticed = 0
        for entry in chosen:
            path = checkout / entry.file
            text = path.read_text(encoding="utf-8")
            if text.count(entry.old) != 1:
                raise SystemExit(f"{entry.name}: {entry.file} holds {entry.old!r} {text.count(entry.old)} times")
            whole, _ = passes(entry.test, checkout)
            path.write_text(text.replace(entry.old, entry.new), encoding="utf-8")
            broken, said = passes(entry.test, checkout)
            path.write_text(text, encoding="utf-8")
            unnoticed += broken or not whole
            table.add_row(entry.name, entry.test.rpartition("/")[2], "passes" if whole else "FAILS",
                          "PASSES" if broken else "fails", said[:100])
            Console(width=200).print(f"{entry.name}: {'unnoticed' if broken else 'noticed'}")
    Console(width=200).print(table)
    sys.exit(bool(unnoticed))


if __name__ == "__main__":
    main()
