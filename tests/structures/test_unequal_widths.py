"""Groups that fit each other only while they are equally wide are left out: each is tried with another width."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from obc.structures.traced import TorchPruningStructure


def viewed(one: Tensor, other: Tensor) -> Tensor:
    """As PixArt takes the width of its text from its image."""
    return other.view(len(other), -1, one.shape[-1])


def cut_off(one: Tensor, other: Tensor) -> Tensor:
    return other[..., : one.shape[-1]]


def padded(one: Tensor, other: Tensor) -> Tensor:
    return torch.cat([other, other.new_zeros(*other.shape[:-1], max(0, one.shape[-1] - other.shape[-1]))], -1)


class Pair(nn.Module):
    """Two layers of one width, each with a reader of its own; one reads what depends on the width of the other."""

    def __init__(self, joined: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.joined = joined
        self.one, self.other, self.third = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(5, 8)
        self.read_one, self.read_other, self.read_third = nn.Linear(8, 3), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        read = self.read_one(y).sum(1) + self.read_third(self.third(x)).sum(1)
        return read + self.read_other(self.joined(y, self.other(x))).sum(1)


@pytest.mark.parametrize("joined", [viewed, cut_off, padded])
def test_what_is_right_for_equal_widths_alone_is_left_out(joined: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Pair(joined).double().eval(), torch.randn(2, 8, 5, dtype=torch.float64)
    structure = TorchPruningStructure(model, x)
    names = {group.name for group in structure.groups}
    assert "third" in names
    assert not {"one", "other"} <= names
    structure.remove({name: torch.arange(1 + number) for number, name in enumerate(sorted(names))})
    assert model(x).isfinite().all()
