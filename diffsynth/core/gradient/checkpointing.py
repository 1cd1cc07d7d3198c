"""Trade a second forward pass for the memory of the activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..device import num_gpus


def set_gradient_checkpointing(network: torch.nn.Module, enabled: bool, offload: bool = False) -> None:
    """Switch a diffusers network to recompute its blocks in the backward pass, or back.

    Args:
        network: A diffusers model; one without support for checkpointing is an error.
        enabled: False stores all activations: faster by about a third, at several times the memory.
        offload: Keep the inputs of the blocks in host memory until they are needed.
    Raises:
        ValueError: the network cannot be checkpointed.
    """
    if not enabled:
        if getattr(network, "is_gradient_checkpointing", False):
            network.disable_gradient_checkpointing()  # type: ignore[operator]
        return
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise ValueError(f"{type(network).__name__} does not support gradient checkpointing.")
    network.enable_gradient_checkpointing(checkpoint_offloaded if offload else checkpoint_kept)  # type: ignore[operator]


def checkpoint_kept(block: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(block, *args, use_reentrant=False)


def checkpoint_offloaded(block: Callable[..., Any], *args: Any) -> Any:
    with torch.autograd.graph.save_on_cpu(pin_memory=num_gpus() > 0):
        return checkpoint(block, *args, use_reentrant=False)
