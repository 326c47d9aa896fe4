"""Tensors that modules hold as plain attributes, such as tables of positions computed when they are built."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

import obc
from obc.structures.traced import TorchPruningStructure

DOUBLE = torch.float64


class Holder(nn.Module):
    def __init__(self, held: Tensor) -> None:
        super().__init__()
        self.held, self.count = held, torch.tensor(3.0)


class Between(nn.Module):
    """A linear layer, or a convolution of one pixel, what is computed with the tensor, and a layer that reads it."""

    def __init__(self, held: Tensor, compute: Callable[[Tensor, Tensor], Tensor], width: int = 8) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.inner, self.compute = Holder(held), compute

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.compute(self.stem(x), self.inner.held.to(x))))


# The shape of the tensor, its dimension of channels, and what is computed.
KINDS: dict[str, tuple[tuple[int, ...], int, Callable[[Tensor, Tensor], Tensor]]] = {
    "positions": ((7, 8), 1, lambda x, held: x + held),
    "as long as wide": ((8, 8), 1, lambda x, held: x + held[: x.shape[1]]),
    "scale": ((8,), 0, lambda x, held: x * held),
    "channels first": ((1, 8, 7), 1, lambda x, held: (x.mT + held).mT),
    "flipped": ((7, 8), 1, lambda x, held: x + held.flip(1)),
}


@pytest.mark.sampled(members=4)
@pytest.mark.parametrize("name", KINDS)
def test_held_tensors_lose_the_channels_that_meet_them(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape, dim, compute = KINDS[name]
    held = torch.randn(shape, dtype=DOUBLE)
    model, x = Between(held, compute).double(), torch.randn(2, 7, 5, dtype=DOUBLE)
    original, keys = copy.deepcopy(model), list(model.state_dict())
    structure = TorchPruningStructure(model, x)
    assert "held" in vars(model.inner)  # finding groups changes nothing
    assert [(group.name, group.size) for group in structure.groups] == [("stem", 8)]
    structure.remove({"stem": torch.tensor([1, 2, 6])})
    stay = structure.plan["stem"].out_channels
    assert stay is not None
    assert list(model.state_dict()) == keys

    left = structure.plan["inner.held"].out_channels
    assert left is not None
    table = held.index_select(dim, left)
    hidden = F.linear(x, original.stem.weight[stay], original.stem.bias[stay])
    expected = F.linear(F.relu(compute(hidden, table)), original.head.weight[:, stay], original.head.bias)
    masked = copy.deepcopy(original)
    masked.head.weight.data.index_fill_(1, torch.tensor([c for c in range(8) if c not in stay.tolist()]), 0)
    torch.testing.assert_close(model(x), masked(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    structure.plan.save(tmp_path / "plan.json")
    again = obc.PruningPlan.load(tmp_path / "plan.json").apply(original)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_a_plan_for_a_tensor_that_a_model_lacks_is_refused() -> None:
    torch.manual_seed(0)
    model, x = Between(torch.randn(7, 8), KINDS["positions"][2]), torch.randn(2, 7, 5)
    original = copy.deepcopy(model)
    structure = TorchPruningStructure(model, x)
    structure.remove({"stem": torch.tensor([0])})
    del original.inner.held
    with pytest.raises(obc.PlanError, match=r"the plan has an entry for 'inner\.held', which the model lacks"):
        structure.plan.apply(original)
