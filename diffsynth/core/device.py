"""Where to compute: the one place that chooses between ``cpu``, ``cuda`` and ``mps``, and knows what each cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .errors import UserError

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Weights of frozen networks for each value of ``mixed_precision``."""


@dataclass(frozen=True)
class Ability:
    """Something that not every device can do."""

    kinds: tuple[str, ...]
    """Kinds of device that can."""
    needs: str
    """What it takes, in words."""
    instead: str
    """What to do where it is missing."""


ABILITIES = {
    "float16 training": Ability(
        ("cuda",), "a GPU with CUDA or ROCm, whose gradients can be scaled", "use --mixed_precision bf16 or no"),
    "bfloat16": Ability(
        ("cpu", "cuda", "mps"), "a device that computes in bfloat16 (NVIDIA Ampere or newer, macOS 14 or newer)",
        "use float16 (fp16) or float32 (no)"),
    "float8 storage": Ability(
        ("cpu", "cuda"), "a device that knows float8", "leave --fp8_models out, or use --device cpu"),
    "several processes": Ability(
        ("cpu", "cuda"), "a device whose processes can exchange gradients", "start one process"),
    "pinned memory": Ability(("cuda",), "a GPU with CUDA or ROCm", "use ordinary memory"),
    "float64": Ability(("cpu", "cuda"), "a device that computes in float64", "use float32"),
}
"""What a run may ask of its device. ``mps`` has neither float8, float64, pinned memory nor collective operations, and
no loss scaling that this project could try; ``cpu`` has float16, and no loss scaling."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What decides whether a device can do something; ``of`` asks torch."""

    kind: str
    """``cpu``, ``cuda`` or ``mps``."""
    has_bfloat16: bool = True

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        if device.type == "cuda":
            with torch.cuda.device(device):
                return cls(kind="cuda", has_bfloat16=torch.cuda.is_bf16_supported(including_emulation=False))
        if device.type == "mps":
            return cls(kind="mps", has_bfloat16=torch.backends.mps.is_macos_or_newer(14, 0))
        return cls(kind=device.type)

    def can(self, ability: str) -> bool:
        """Whether it can do what ``ABILITIES`` describes."""
        return self.kind in ABILITIES[ability].kinds and (ability != "bfloat16" or self.has_bfloat16)

    def require(self, asked: Mapping[str, str | None]) -> None:
        """Refuse what this machine cannot do.

        Args:
            asked: Ability -> how it was asked for, such as ``--mixed_precision fp16``; None where it was not.
        Raises:
            UserError: names the first that is missing.
        """
        for name, words in asked.items():
            if words is not None and not self.can(name):
                ability = ABILITIES[name]
                raise UserError(f"{words} needs {ability.needs}, and this run is on {self.kind}; {ability.instead}.")


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
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name!r} is not supported; use auto, cpu, cuda, cuda:N or mps.")
    if device.type == "cuda":
        count = num_gpus()
        if count == 0:
            raise UserError(f"device {name!r} was asked for, but torch finds no GPU here; use --device cpu, "
                            "or install a CUDA build of torch and a driver.")
        if device.index is not None and device.index >= count:
            raise UserError(f"device {name!r} was asked for, but this machine has only cuda:0 to cuda:{count - 1}.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' was asked for, but torch finds no Apple GPU here; use --device cpu.")
    return device


def num_gpus() -> int:
    """GPUs with CUDA or ROCm that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def may_use_all_gpus(name: str) -> bool:
    """Whether a ``device`` option leaves the choice of the GPU open."""
    return name in ("auto", "cuda")


def is_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def pins_memory(device: torch.device) -> bool:
    """Whether copies between this device and pinned host memory are faster, and need not be waited for."""
    return Machine(kind=device.type).can("pinned memory")


def has_float64(device: torch.device) -> bool:
    return Machine(kind=device.type).can("float64")


def use_from_now_on(device: torch.device) -> None:
    """Make one of several GPUs the current one of this process."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def wait_for(device: torch.device) -> None:
    """Return when everything that was started on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def return_free_memory(device: torch.device) -> None:
    """Give the memory that torch keeps for later back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def gpu_is_in_use() -> bool:
    """Whether this process has used a CUDA GPU so far."""
    return torch.cuda.is_initialized()
