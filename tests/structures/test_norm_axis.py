"""Norms of their own over the channels of images that are as wide, or as high, as they have channels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from obc.structures.norm_axis import norm_axis
from obc.structures.traced import TorchPruningStructure


class Norm(nn.Module):
    """A weight and a bias with one value for each of 8 channels, and what they do."""

    def __init__(self, does: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.does = does
        self.weight, self.bias = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, x)


def wide(tensor: Tensor) -> Tensor:
    return tensor.view(-1, 1, 1)


def layer_norm(net: Any, x: Tensor) -> Tensor:
    """Of ConvNeXt, channels first."""
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * wide(net.weight) + wide(net.bias)


KINDS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "layer norm": layer_norm,
    "rms norm": lambda net, x: x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * wide(net.weight) + wide(net.bias),
    "scale": lambda net, x: x * wide(net.weight) + wide(net.bias),
    "moved": lambda net, x: nn.functional.layer_norm(x.movedim(1, -1), net.weight.shape, net.weight).movedim(-1, 1),
}


class Shuffled(nn.Module):
    """Every second channel first, which tracing does not follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


@pytest.mark.sampled(members=6)
@pytest.mark.parametrize("shuffled", [False, True], ids=["traced", "run"])
@pytest.mark.parametrize("size", [(6, 8), (8, 6), (8, 8), (6, 6)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_images_as_wide_as_they_have_channels_are_pruned_and_proved(
    kind: str, size: tuple[int, int], shuffled: bool
) -> None:
    torch.manual_seed(0)
    middle = [Shuffled()] if shuffled else []
    net = nn.Sequential(nn.Conv2d(3, 8, 1), *middle, Norm(KINDS[kind]), nn.ReLU(), nn.Conv2d(8, 4, 3)).double().eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    structure = TorchPruningStructure(copy.deepcopy(net), images)
    assert [group.name for group in structure.groups] == ["0"], structure.left_out
    assert structure.proof is not None
    assert structure.proof.unproved == {}
    assert structure.proof.proved == ["0"]
    structure.remove({"0": torch.tensor([1])})
    kept = structure.plan["0"].out_channels
    assert kept is not None
    norm = structure.model[-3]
    read = [channel for channel in range(8) if not shuffled or (channel % 4) * 2 + channel // 4 in kept.tolist()]
    read = read if shuffled else kept.tolist()
    torch.testing.assert_close(norm.weight, net[-3].weight[read], rtol=0, atol=0)
    want = KINDS[kind](norm, net[: 1 + len(middle)](images)[:, read])
    torch.testing.assert_close(structure.model[:-2](images), want, rtol=1e-12, atol=1e-12)


def test_a_norm_that_does_not_tell_is_named_with_the_remedy() -> None:
    torch.manual_seed(0)
    blind = Norm(lambda net, x: x * net.weight.mean())
    net = nn.Sequential(nn.Conv2d(3, 8, 1), blind, nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    with pytest.raises(
        ValueError, match=r"input \(2, 8, 6, 8\) holds the 8 channels of a norm .*inputs of another size"
    ):
        norm_axis(blind.forward, (torch.ones(2, 8, 6, 8),), {}, 8, -1)
    assert norm_axis(blind.forward, (torch.ones(2, 8, 6, 6),), {}, 8, -1) == 1
    assert norm_axis(blind.forward, (torch.ones(2, 6, 6, 8),), {}, 8, -1) == 3
    assert norm_axis(blind.forward, (torch.ones(2, 6, 6, 6),), {}, 8, -1) is None
    structure = TorchPruningStructure(net, torch.randn(2, 3, 6, 8))
    assert not structure.groups
    assert "of a norm is not known; pass example_inputs of another size" in structure.left_out["0"]
    assert [group.name for group in TorchPruningStructure(net, torch.randn(2, 3, 6, 6)).groups] == ["0"]
