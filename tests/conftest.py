"""Shared fixtures: one tiny FLUX for the whole session, one thread per process so that numbers repeat exactly."""

from __future__ import annotations

import os
import socket
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)
pytest_plugins = ["tests.contract_table"]


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory):
    """A tiny ``diffusers.FluxPipeline`` in float32."""
    from tests.tiny_flux import build_pipeline

    return build_pipeline(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="session")
def flux_folder(tiny_flux, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same networks as the files of the older page."""
    from tests.tiny_flux import save_original_layout

    return save_original_layout(tiny_flux, tmp_path_factory.mktemp("models") / "FLUX" / "FLUX.1-dev")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may leave this machine; loopback servers are part of some tests."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
