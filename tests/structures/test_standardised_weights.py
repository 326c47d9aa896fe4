"""Layers that standardise their weights over the in channels: what they read keeps its width, with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from obc.structures.traced import TorchPruningStructure


class Standardised(nn.Conv2d):
    """As in NFNets and BiT."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Centred(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, 1, self.padding)


class CentredRows(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


def convolutions(kind: Any) -> tuple[nn.Module, Tensor]:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), kind(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 1)]
    return nn.Sequential(*layers).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)


def linear() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(3, 8), nn.ReLU(), CentredRows(8, 6), nn.ReLU(), nn.Linear(6, 2)]
    return nn.Sequential(*layers).double(), torch.randn(5, 3, dtype=torch.float64)


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "Standardised": lambda: convolutions(Standardised),
    "Centred": lambda: convolutions(Centred),
    "CentredRows": linear,
}


@pytest.mark.parametrize("name", CASES)
def test_what_it_reads_stays_with_a_reason_and_what_it_writes_goes(name: str) -> None:
    torch.manual_seed(0)
    model, x = CASES[name]()
    structure = TorchPruningStructure(model, x)
    assert [group.name for group in structure.groups] == ["2"]
    assert f"'2' is a {name}, which has a forward of its own" in structure.left_out["0"]
    assert (
        "obc.plain_layers(model, example_inputs) puts a plain layer with that weight in its place"
        in structure.left_out["0"]
    )
    gone = torch.tensor([1, 4])
    with torch.no_grad():
        hidden = model[:4](x)  # type: ignore[index]
        hidden[:, gone] = 0
        expected = model[4](hidden)  # type: ignore[index]
    structure.remove({"2": gone})
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
