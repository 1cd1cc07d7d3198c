"""A folder as the pages lay it out: models, data sets, and commands run in it as real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pictures import make_dataset, make_older_dataset

REPOSITORY = Path(__file__).parents[2]
MODELS = json.dumps([
    "models/FLUX/FLUX.1-dev/flux1-dev.safetensors", "models/FLUX/FLUX.1-dev/ae.safetensors",
    "models/FLUX/FLUX.1-dev/text_encoder/model.safetensors", "models/FLUX/FLUX.1-dev/text_encoder_2",
])


class Workplace:
    """A folder with ``models/`` and ``data/`` in which commands run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def python(self, *words: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run python with these words and check its exit code."""
        finished = subprocess.run(
            [sys.executable, *words], cwd=self.folder, capture_output=True, text=True, check=False, timeout=300,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "DIFFSYNTH_SKIP_DOWNLOAD": "True",
                 "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **environment},
        )
        assert finished.returncode == code, finished.stdout + finished.stderr
        return finished

    def diffsynth(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        return self.python("-m", "diffsynth", *words, code=code)

    def accelerate(self, *words: str, num_processes: int = 1, port: int = 29731) -> subprocess.CompletedProcess[str]:
        """``accelerate launch`` on the CPU; several processes talk over gloo."""
        kind = ["--multi_gpu", "--main_process_port", str(port)] if num_processes > 1 else ["--cpu"]
        return self.python(
            "-m", "accelerate.commands.launch", *kind, "--num_processes", str(num_processes), "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", *words, ACCELERATE_USE_CPU="true",
        )


@pytest.fixture(scope="session")
def workplace(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "models" / "FLUX").mkdir(parents=True)
    (folder / "models" / "FLUX" / "FLUX.1-dev").symlink_to(flux_folder)
    # where ModelConfig(model_id="black-forest-labs/FLUX.1-dev") looks
    (folder / "models" / "black-forest-labs").mkdir()
    (folder / "models" / "black-forest-labs" / "FLUX.1-dev").symlink_to(flux_folder)
    make_dataset(folder / "data" / "example_image_dataset")
    make_older_dataset(folder / "data" / "dog")
    return Workplace(folder)
