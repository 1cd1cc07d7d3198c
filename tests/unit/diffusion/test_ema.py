"""The average of the trained weights: its numbers, written out; and that looking at it leaves the weights alone."""

from __future__ import annotations

import pytest
import torch

from diffsynth.diffusion.ema import WeightAverage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_follows_the_formula(dtype):
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype))
    average = WeightAverage({"w": weight}, decay=0.5)
    expected = weight.detach().double()
    for step in range(12):
        with torch.no_grad():
            weight += 1 + step
        average.update()
        # 1/10, 2/11, 3/12, ... until the asked-for 0.5 is less
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach().double()
    assert average.weights["w"].dtype == torch.float32
    assert torch.allclose(average.weights["w"].double(), expected, rtol=1e-6)
    assert average.num_updates == 12


def test_saved_average_goes_on_bit_for_bit():
    weight = torch.nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)))
    straight, other = (WeightAverage({"w": weight}, 0.9) for _ in range(2))
    straight.update()
    other.restore({name: value.clone() for name, value in straight.weights.items()}, straight.num_updates)
    for average in (straight, other):
        average.update()
    assert torch.equal(straight.weights["w"], other.weights["w"])


def test_applied_average_is_taken_off_again_whatever_happens():
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    average = WeightAverage({"w": weight}, 0.9)
    average.weights["w"] += 0.1
    storage = weight.data_ptr()
    with pytest.raises(RuntimeError, match="inside"), average.applied():
        assert torch.equal(weight.detach(), average.weights["w"])
        raise RuntimeError("inside")
    assert weight.data_ptr() == storage
    assert weight.dtype == torch.bfloat16
    assert not weight.any()
