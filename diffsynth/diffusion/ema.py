"""An exponential moving average of the trained weights, kept beside them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch

from .saving import values_replaced


class WeightAverage:
    """Float32 copies of the trained weights that follow them slowly.

    After update n (counted from 0), ``average = d * average + (1 - d) * weights`` with
    ``d = min(decay, (1 + n) / (10 + n))``, so that the first values, which are far from the end, are soon forgotten.
    Source of the average: Polyak and Juditsky 1992, SIAM J. Control Optim. 30(4); of the warm-up: ``num_updates`` of
    TensorFlow's ``tf.train.ExponentialMovingAverage``.

    Args:
        parameters: Trained parameters by name.
        decay: Between 0 and 1; the average looks back over about ``1 / (1 - decay)`` steps.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.num_updates = 0
        self.weights = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in parameters.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        current = [parameter.detach().float() for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - decay)

    def applied(self) -> AbstractContextManager[None]:
        """Within this block the parameters hold the average."""
        return values_replaced(self.parameters, self.weights)

    def restore(self, weights: Mapping[str, torch.Tensor], num_updates: int) -> None:
        """Go on from a saved average."""
        for name, average in self.weights.items():
            average.copy_(weights[name])
        self.num_updates = num_updates
