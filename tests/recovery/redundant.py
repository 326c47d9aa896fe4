"""Shared by the tests of compensation: a model with half of its channels redundant."""

from __future__ import annotations

import copy

import torch
from prunable import RECIPES, Pruned
from torch import Tensor, nn

from obc.recovery import (
    Kept,
    PruningPlan,
)

MODES = ["ls", "seq", "correct"]


def batches(name: str, count: int = 10, size: int = 16) -> list[Tensor]:
    return [RECIPES[name].inputs(size, seed=100 + seed) for seed in range(count)]


def output_error(model: nn.Module, original: nn.Module, inputs: list[Tensor]) -> float:
    with torch.no_grad():
        pairs = [(model.eval()(x), original.eval()(x)) for x in inputs]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs))


class Redundant(nn.Module):
    """Two layers around a ReLU; half of the hidden channels are affine in the other half, so nothing need be lost."""

    def __init__(self, layer: str, bias: bool = True) -> None:
        super().__init__()
        if layer == "linear":
            self.producer, self.consumer = nn.Linear(5, 8), nn.Linear(8, 4, bias=bias)
        elif layer == "conv":
            self.producer, self.consumer = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, bias=bias)
        elif layer == "grouped":
            self.producer, self.consumer = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, groups=2, bias=bias)
        elif layer == "transposed":
            self.producer, self.consumer = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2, stride=2, bias=bias)
        else:
            self.producer, self.consumer = nn.Conv2d(3, 8, 3), nn.Linear(8 * 16, 4, bias=bias)
        self.flatten = layer == "flatten"
        with torch.no_grad():  # channels 4-7 are mixtures of 0-3 inside each half, where the groups of "grouped" lie
            weight, offset = self.producer.weight, self.producer.bias
            for target, first, second in ((2, 0, 1), (3, 1, 0), (6, 4, 5), (7, 5, 4)):
                weight[target] = 0.7 * weight[first] - 0.4 * weight[second]
                offset[target] = 0.7 * offset[first] - 0.4 * offset[second] + (0.5 if bias else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.producer(x)
        return self.consumer(x.flatten(1) if self.flatten else x)


def prune_redundant(layer: str, bias: bool = True) -> tuple[Pruned, list[Tensor]]:
    torch.manual_seed(1)
    original = Redundant(layer, bias).double()
    kept = torch.tensor([0, 1, 4, 5])
    repeat = 16 if layer == "flatten" else 1
    plan = PruningPlan({"producer": Kept(kept), "consumer": Kept(None, kept, repeat)})
    pruned = copy.deepcopy(original)
    for module, side in ((pruned.producer, "out"), (pruned.consumer, "in")):
        if side == "out":
            module.weight = nn.Parameter(module.weight[kept].detach())
            module.bias = nn.Parameter(module.bias[kept].detach())
        elif layer == "grouped":
            module.weight = nn.Parameter(module.weight[:, :2].detach())
            module.in_channels = 4
        elif layer == "transposed":
            module.weight = nn.Parameter(module.weight[kept].detach())
            module.in_channels = 4
        else:
            columns = plan["consumer"].in_columns
            module.weight = nn.Parameter(module.weight[:, columns].detach())
    plan.verify(original.state_dict(), pruned)
    shape = (5,) if layer == "linear" else (3, 6, 6)
    inputs = [torch.randn(32, *shape, dtype=torch.float64) for _ in range(6)]
    return Pruned(original, pruned, plan), inputs
