"""Layers with complex weights, and inputs that are no floating-point numbers, are named for what they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import obc
from obc.statistics import StatisticsError


class Spectral(nn.Module):
    """A complex layer between two real ones."""

    def __init__(self, mixed: nn.Module) -> None:
        super().__init__()
        self.first, self.mixed, self.last = nn.Linear(6, 8), mixed, nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.fft(self.first(x))
        spectrum = self.mixed(spectrum if isinstance(self.mixed, nn.Linear) else spectrum.unsqueeze(1))
        output: Tensor = self.last(spectrum.abs().flatten(1))
        return output


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "mixed", [nn.Linear(8, 8, dtype=torch.complex64), nn.Conv1d(1, 2, 3, dtype=torch.complex64)], ids=["linear", "conv"]
)
def test_complex_layers_are_left_out_and_the_others_read(mixed: nn.Module) -> None:
    torch.manual_seed(0)
    model, batches = Spectral(mixed), [torch.randn(4, 6) for _ in range(3)]
    model(batches[0])
    reason = "its weight is torch.complex64, and only real channels are read"

    scores = obc.score(model, batches, loss_of)
    with pytest.warns(UserWarning, match=f"'mixed' .{reason}"):
        statistics = obc.collect(model, batches, statistics="gram")

    assert scores.coverage["mixed"] == f"unscored: {reason}"
    assert statistics.coverage["gram"]["mixed"] == f"unread: {reason}"
    inputs = torch.cat(batches).double()
    torch.testing.assert_close(statistics.gram["first"].total, inputs.T @ inputs, rtol=1e-5, atol=1e-5)
    expected = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        grads = torch.autograd.grad(loss_of(model, batch), [model.last.weight, model.last.bias])
        rows = [
            (p * g).double().flatten(1).sum(1) if p.dim() > 1 else p * g
            for p, g in zip((model.last.weight, model.last.bias), grads, strict=True)
        ]
        expected += sum(rows).detach().square()  # type: ignore[union-attr]
    torch.testing.assert_close(scores["last"].out_channels.double(), expected, rtol=1e-4, atol=0)


class Casting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


@pytest.mark.parametrize(
    ("inputs", "got"),
    [
        (torch.ones(4, 6, dtype=torch.int64), r"int64 \(4, 6\) on cpu"),
        (torch.ones(4, 6, dtype=torch.bool), r"bool \(4, 6\) on cpu"),
    ],
)
def test_an_input_without_floating_point_numbers_is_described(inputs: Any, got: str) -> None:
    with pytest.raises(
        ValueError, match=f"'0' needs a floating-point tensor, got a tuple of {got}; leave it out"
    ) as info:
        obc.collect(nn.Sequential(Casting(6, 3)), [inputs], statistics="gram")
    assert isinstance(info.value.__cause__ or info.value, StatisticsError)
