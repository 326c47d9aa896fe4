"""Modules outside torch that keep the shape of a parameter in an attribute: it changes with the parameter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from obc.model.plan import PruningPlan
from obc.structures.traced import TorchPruningStructure


class Scale(nn.Module):
    """The scale of layers in MetaFormer: ``forward`` views it as the shape that it was made with."""

    def __init__(self, width: int, shape: Callable[[int], Any]) -> None:
        super().__init__()
        self.shape, self.scale = shape(width), nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(self.shape)


class Norm(nn.Module):
    """A LayerNorm outside torch, as in ConvNeXt's and Restormer's own code."""

    def __init__(self, width: int, kind: Callable[[Any], Any]) -> None:
        super().__init__()
        self.normalized_shape = kind((width,))
        self.weight, self.bias = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias).permute(0, 3, 1, 2)


class Positions(nn.Module):
    """A table of positions of the size of the map, with one entry for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.size, self.table = (1, width, 6, 6), nn.Parameter(torch.randn(width, 6, 6))
        self.window, self.count = (6, 6), width  # neither is the table's shape

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table.view(self.size)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "a tuple": lambda: Scale(8, lambda width: (width, 1, 1)),
    "a list": lambda: Scale(8, lambda width: [1, width, 1, 1]),
    "a torch.Size": lambda: Scale(8, lambda width: torch.Size((width, 1, 1))),
    "a norm's tuple": lambda: Norm(8, tuple),
    "a norm's torch.Size": lambda: Norm(8, torch.Size),
    "of several dimensions": lambda: Positions(8),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_shape_changes_with_the_parameter(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), layer, nn.ReLU(), nn.Conv2d(8, 2, 1)).double()
    original, x = copy.deepcopy(model), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    structure = TorchPruningStructure(model, x)
    assert [group.name for group in structure.groups] == ["0"]
    gone, stay = torch.tensor([1, 4, 6]), torch.tensor([0, 2, 3, 5, 7])
    structure.remove({"0": gone})
    own, before = vars(model[1]), vars(original[1])
    kept = next(key for key in ("shape", "normalized_shape", "size") if key in own)
    assert own[kept] == type(before[kept])(5 if size == 8 else size for size in before[kept])
    assert type(own[kept]) is type(before[kept])
    assert all(own[key] == before[key] for key in ("window", "count") if key in own)

    # The pruned model by hand: the layer in the middle of five channels has every parameter's entries of these.
    expected = original[0](x)[:, stay]
    middle = copy.deepcopy(original[1])
    for key, parameter in list(middle.named_parameters()):
        setattr(middle, key, nn.Parameter(parameter[stay].detach()))
    vars(middle)[kept] = own[kept]
    expected = F.conv2d(F.relu(middle(expected)), original[3].weight[:, stay], original[3].bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)

    structure.plan.save(path := tmp_path / "plan.json")
    again = PruningPlan.load(path).apply(original)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


class OneAxis(nn.Conv1d):
    """A convolution of a library's own."""


class TwoAxes(nn.Conv2d):
    """The same on a map."""


CONVOLUTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "kernel and dilation": lambda before, after: OneAxis(before, after, 4, dilation=4, padding=6),
    "stride and padding": lambda before, after: OneAxis(before, after, 3, stride=4, padding=4),
    "of rows": lambda before, after: TwoAxes(before, after, (1, 2), dilation=(1, 4)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_settings_of_a_convolution_that_equal_its_width_stay(name: str) -> None:
    """Two steps: after the first the layer's bias is as long as the kernel, the stride, or the padding."""
    torch.manual_seed(0)
    convolution = CONVOLUTIONS[name](3, 8)
    narrow = isinstance(convolution, nn.Conv1d)
    last, shape = (nn.Conv1d(8, 2, 1), (2, 3, 24)) if narrow else (nn.Conv2d(8, 2, 1), (2, 3, 6, 9))
    model = nn.Sequential(convolution, nn.ReLU(), last).double()
    masked, x = copy.deepcopy(model), torch.randn(shape, dtype=torch.float64)
    structure = TorchPruningStructure(model, x)
    structure.remove({"0": torch.arange(4, 8)})
    structure.remove({"0": torch.tensor([3])})
    with torch.no_grad():
        for parameter in masked[0].parameters():
            parameter[3:] = 0
    torch.testing.assert_close(model(x), masked(x), rtol=1e-12, atol=1e-12)
