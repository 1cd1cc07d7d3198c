"""Frozen linear layers stored in float8, computed in the dtype of their input: one byte a weight instead of two."""

from __future__ import annotations

from typing import Any

import torch


class _CastLinear(torch.autograd.Function):
    """A linear layer that casts its weight again in the backward pass instead of keeping the wide copy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.to(gradients[0].dtype), None, None


class Fp8Linear(torch.nn.Linear):
    """``torch.nn.Linear`` whose frozen weight is stored in ``torch.float8_e4m3fn``."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return _CastLinear.apply(input, self.weight, self.bias)


def store_in_fp8(network: torch.nn.Module) -> None:
    """Store the weights of every plain linear layer of a frozen network in float8 (e4m3), in place.

    Norms, embeddings, biases and convolutions keep their dtype: they are small, and sensitive. Call it before adapters
    are injected.
    """
    # layers whose dtype the network itself looks at, such as T5's second feed-forward layer
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for name, layer in network.named_modules():
        if type(layer) is torch.nn.Linear and not kept & set(name.split(".")):
            layer.__class__ = Fp8Linear
            layer.weight.requires_grad_(False)
            layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
