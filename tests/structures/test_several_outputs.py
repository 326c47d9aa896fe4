"""Layers that return more than one tensor: pruned if one has the channels, left out with the reason if several have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import obc

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from obc.model.errors import PruningError
from obc.structures.traced import TorchPruningStructure


class ConvOfSequences(nn.Conv1d):
    """Passes lengths on, as the convolutions of speech models do."""

    def forward(self, x: Tensor, lengths: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x * (torch.arange(x.shape[-1]) < lengths[:, None])[:, None]), lengths


class LinearAndBias(nn.Linear):
    """Returns its bias beside the output, or nothing in its place, as parallel layers do."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class UpAndPlaces(nn.ConvTranspose1d):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        y = super().forward(x)
        return {"y": y, "places": y.argmax(-1)}


class Octave(nn.Conv2d):
    """Half of its channels have half of the resolution."""

    def forward(self, x: Tensor) -> Any:
        high, low = super().forward(x).chunk(2, 1)
        return high, F.avg_pool2d(low, 2)


class Net(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module, between: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = first, second, between

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.between(self, *inputs)


def _speech(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    y, lengths = net.first(x, lengths)
    return net.second(y.relu(), lengths)[0].mean(-1)


MEMBERS: dict[str, tuple[Callable[[], Net], tuple[Tensor, ...]]] = {
    "sequences": (
        lambda: Net(ConvOfSequences(4, 8, 3, padding=1), ConvOfSequences(8, 3, 1), _speech),
        (torch.rand(2, 4, 9, dtype=torch.float64), torch.tensor([9, 6])),
    ),
    "nothing beside": (
        lambda: Net(LinearAndBias(6, 8), LinearAndBias(8, 3), lambda net, x: net.second(net.first(x)[0].relu())[0]),
        (torch.rand(5, 6, dtype=torch.float64),),
    ),
    "a dict": (
        lambda: Net(UpAndPlaces(4, 8, 2), nn.Conv1d(8, 3, 1), lambda net, x: net.second(net.first(x)["y"].relu())),
        (torch.rand(2, 4, 9, dtype=torch.float64),),
    ),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_the_one_floating_tensor_has_the_channels(name: str) -> None:
    torch.manual_seed(0)
    build, inputs = MEMBERS[name]
    net = build().double().eval()
    structure = TorchPruningStructure(copy.deepcopy(net), inputs)
    assert [(group.name, group.size) for group in structure.groups] == [("first", 8)]
    units = torch.tensor([1, 4, 6])
    masked = copy.deepcopy(net)
    masked.second.register_forward_pre_hook(
        lambda module, args: (args[0].index_fill(-1 if isinstance(module, nn.Linear) else 1, units, 0.0), *args[1:])
    )
    costs = structure.costs("macs")
    assert costs.total(torch.tensor([5])) == pytest.approx(costs.total() * 5 / 8)
    structure.remove({"first": units})
    torch.testing.assert_close(structure.model(*inputs), masked(*inputs), rtol=0, atol=1e-14)


def test_several_floating_tensors_keep_the_widths_on_both_sides_and_the_reason_says_so() -> None:
    torch.manual_seed(0)

    def between(net: Any, x: Tensor) -> Tensor:
        high, low = net.first(net.stem(x).relu())
        return net.second((net.high(high) + F.interpolate(net.low(low), scale_factor=2)).relu())

    net = Net(Octave(6, 8, 3, padding=1), nn.Conv2d(5, 3, 1), between)
    net.stem, net.high, net.low = nn.Conv2d(3, 6, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    result = obc.prune(net.double().eval(), x, [x] * 4, loss, params=0.95, progress=False)
    assert set(result.report.widths) == {"high"}
    reason = "'first' (Octave) returns several tensors: which of them holds which of its channels is not known"
    assert {result.report.left_out[name] for name in ("stem", "first")} == {reason}


def test_a_model_whose_tracing_fails_runs_as_before() -> None:
    """Torch-Pruning's hooks stay on a model that it can't trace, and would fail in every later call."""
    net, (x,) = MEMBERS["a dict"][0]().double().eval(), MEMBERS["a dict"][1]
    expected = net(x)
    with pytest.raises(PruningError, match="tracing it with Torch-Pruning failed in 'first'"):
        TorchPruningStructure(net, x, check=False)
    assert not any(module._forward_hooks for module in net.modules())
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
