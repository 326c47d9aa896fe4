"""Subclasses of layers with tensors of their own beside weight and bias: masks, scales, noise."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obc.structures.traced import TorchPruningStructure


class Own(nn.Conv2d):
    """A convolution whose weight and output are changed by a tensor ``own``."""

    def __init__(self, inputs: int, outputs: int, shape: Callable[[int, int], tuple[int, ...]], where: str) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        values = torch.rand(shape(outputs, inputs)) + 0.5
        if where.startswith("buffer"):
            self.register_buffer("own", values)
        else:
            self.own = nn.Parameter(values)
        self.where = where.split()[1]

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "output":
            return super().forward(x) * (self.own[:, None, None] if self.own.dim() == 1 else self.own)
        weight = self.weight * self.own if self.where == "times" else self.weight + self.own
        return F.conv2d(x, weight, self.bias, padding=1)


class Net(nn.Module):
    def __init__(self, layer: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second, self.head = layer(3, 6), layer(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))


def _net(shape: Callable[[int, int], tuple[int, ...]], where: str) -> nn.Module:
    torch.manual_seed(0)
    return Net(lambda inputs, outputs: Own(inputs, outputs, shape, where)).double().eval()


@pytest.mark.parametrize(
    ("shape", "where"),
    [
        (lambda o, i: (o, i, 3, 3), "buffer times"),
        (lambda o, i: (o, i, 3, 3), "parameter plus"),
        (lambda o, i: (o, i, 1, 1), "buffer times"),
        (lambda o, i: (1, i, 3, 3), "buffer times"),
        (lambda o, i: (o, 1, 3, 3), "parameter times"),
        (lambda o, i: (o, 1, 1, 1), "parameter times"),
        (lambda o, i: (1, 1, 3, 3), "parameter times"),
        (lambda o, i: (o,), "parameter output"),
        (lambda o, i: (o, 1, 1), "parameter output"),
        (lambda o, i: (1, o, 1, 1), "buffer output"),
        (lambda o, i: (1,), "parameter output"),
        (lambda o, i: (), "buffer times"),
    ],
)
def test_tensors_of_subclasses_are_cut_with_the_channels(
    shape: Callable[[int, int], tuple[int, ...]], where: str
) -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    net = _net(shape, where)
    masked, pruned = copy.deepcopy(net), copy.deepcopy(net)
    structure = TorchPruningStructure(pruned, x)
    assert [group.name for group in structure.groups] == ["first", "second"]
    gone = {"first": [1, 4], "second": [0, 3, 5]}
    structure.remove({name: torch.tensor(units[:1]) for name, units in gone.items()})
    costs = structure.costs("parameters")
    structure.remove({name: torch.tensor(units[1:]) - 1 for name, units in gone.items()})
    for name, units in gone.items():
        layer = masked.get_submodule(name)
        layer.register_forward_hook(lambda layer, args, y, units=units: y.index_fill(1, torch.tensor(units), 0.0))
    torch.testing.assert_close(pruned(x), masked(x), rtol=1e-12, atol=1e-12)
    assert costs.total(torch.tensor([4, 3])) == sum(parameter.numel() for parameter in pruned.parameters())
    applied = structure.plan.apply(copy.deepcopy(net))
    applied.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(applied(x), pruned(x), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(8,), (1, 8)])
def test_tensors_of_in_channels_where_both_sides_are_equally_wide_keep_the_layer(shape: tuple[int, ...]) -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.own = nn.Parameter(torch.rand(shape) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x * self.own, self.weight, self.bias)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), Scaled(), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    structure = TorchPruningStructure(net, torch.randn(4, 3))
    assert [group.name for group in structure.groups] == ["4"]
    assert structure.left_out.keys() >= {"0", "2"}


def test_masks_beside_a_frozen_weight_are_cut_and_counted() -> None:
    net = _net(lambda o, i: (o, 1, 1, 1), "parameter times")
    for layer in (net.first, net.second):
        weight = layer.weight.detach()
        del layer.weight
        layer.register_buffer("weight", weight)
    structure = TorchPruningStructure(net, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert structure.costs("parameters").total(torch.tensor([6, 6])) == sum(p.numel() for p in net.parameters())
    structure.remove({"first": torch.tensor([1, 4])})
    assert net.first.own.shape == (4, 1, 1, 1)


def test_other_tensors_of_subclasses_keep_the_layer_and_are_named() -> None:
    def scaled(inputs: int, outputs: int) -> nn.Module:
        layer = nn.Linear(inputs, outputs)
        layer.register_buffer("table", torch.ones(5))
        return layer

    layers = [nn.Linear(3, 8), nn.ReLU(), scaled(8, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 2)]
    left_out = TorchPruningStructure(nn.Sequential(*layers), torch.randn(3, 3)).left_out
    for name in ("0", "2"):
        assert "2.table" in left_out[name]
        assert "only tensors that have the weight's shape, or one value per out channel" in left_out[name]
