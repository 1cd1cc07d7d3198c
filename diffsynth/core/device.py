"""Where to compute: the one place that chooses between ``cpu``, ``cuda`` and ``mps``."""

from __future__ import annotations

import torch

from .errors import UserError

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Weights of frozen networks for each value of ``mixed_precision``."""


def choose_device(name: str = "auto") -> torch.device:
    """The device called ``name``; ``auto`` takes the fastest that is here.

    Raises:
        UserError: the device does not exist on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is not known; use auto, cpu, cuda, cuda:N or mps.") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise UserError(f"device {name!r} was asked for, but torch finds no GPU here; use --device cpu, "
                            "or install a CUDA build of torch and a driver.")
        if device.index is not None and device.index >= count:
            raise UserError(f"device {name!r} was asked for, but this machine has only cuda:0 to cuda:{count - 1}.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' was asked for, but torch finds no Apple GPU here; use --device cpu.")
    return device
