"""A network for a while as its own files make it: what was fused into it, and what is trained on it, set aside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .fused import restore_fused, take_out_fused
from .lora import clear_lora
from .targets import adaptable_layers


@contextmanager
def adapters_set_aside(module: torch.nn.Module) -> Iterator[None]:
    """Within this block the network has the weights of its file, and no adapter layers.

    What is loaded into it meanwhile is taken out again at the end; then everything is put back as it was, bit for bit.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name.rpartition(".")[0], name.rpartition(".")[2], layer)
              for name, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)]
    kept: dict[str, Any] = {key: module.__dict__.pop(key) for key in ("peft_config", "_diffsynth_hot_adapters")
            if key in module.__dict__}
    for parent, child, layer in layers:
        setattr(module.get_submodule(parent), child, layer.get_base_layer())
    fused = take_out_fused(module, adaptable_layers(module))
    try:
        yield
    finally:
        clear_lora(module)
        restore_fused(module, adaptable_layers(module), fused)
        module.__dict__.pop("peft_config", None)
        module.__dict__.update(kept)
        for parent, child, layer in layers:
            setattr(module.get_submodule(parent), child, layer)
