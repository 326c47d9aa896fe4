"""Whatever holds weights is in a group or left out by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning", reason="Torch-Pruning is missing: pip install torch-pruning")

from obc.structures.traced import TorchPruningStructure

Reads = Callable[[Any, Tensor], Tensor]
LOST = "neither tracing nor running the model finds"


class Beside(nn.Module):
    """What is tried, and a layer with a reader behind it, which can be pruned in any case."""

    def __init__(self, reads: Reads, **members: Any) -> None:
        super().__init__()
        self.reads = reads
        for name, member in members.items():
            setattr(self, name, member)
        self.wide, self.head = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wide(self.reads(self, x)).relu())


def last_state(net: Any, x: Tensor) -> Tensor:
    state = torch.zeros(len(x), 8)
    for step in x.unbind(1):
        state = net.tried(step, state)
    return state


# Name -> (what reads the tokens, what it holds, left out -> a part of the reason).
HELD: dict[str, tuple[Reads, Callable[[], dict[str, Any]], dict[str, str]]] = {
    "LSTM": (
        lambda net, x: net.tried(x)[0][:, -1],
        lambda: {"tried": nn.LSTM(6, 9, proj_size=8, batch_first=True)},
        {"tried": "a plan can't describe its projections (proj_size)"},
    ),
    "GRU cell": (
        last_state,
        lambda: {"tried": nn.GRUCell(6, 8)},
        {"tried": "each hidden channel of a GRUCell is read by all others in the next step"},
    ),
    "bilinear": (
        lambda net, x: net.tried(x, x).relu(),
        lambda: {"tried": nn.Bilinear(6, 6, 8)},
        {"tried": f"{LOST} channels of this Bilinear that can go"},
    ),
    "attention": (
        lambda net, x: net.project(net.tried(x, x, x)[0]),
        lambda: {"tried": nn.MultiheadAttention(6, 2, batch_first=True), "project": nn.Linear(6, 8)},
        {"tried": f"{LOST} channels of this MultiheadAttention that can go"},
    ),
    "a layer's weight used elsewhere": (
        lambda net, x: F.linear(x, net.tried.weight[:8]).relu(),
        lambda: {"tried": nn.Linear(6, 9)},
        {"tried": "it is not called: what uses its weight is not a layer"},
    ),
    "a weight of the model": (
        lambda net, x: (x @ net.tried.T[:, :8]).relu() + torch.cdist(x, net.tried)[..., :8],
        lambda: {"tried": nn.Parameter(torch.randn(10, 6))},
        {"tried": "it is a weight outside layers, and no channels are found along it"},
    ),
}


@pytest.mark.sampled(members=2)
@pytest.mark.parametrize("name", HELD)
def test_what_holds_weights_is_in_a_group_or_left_out_by_name(name: str) -> None:
    reads, members, expected = HELD[name]
    torch.manual_seed(0)
    model = Beside(reads, **members())
    structure = TorchPruningStructure(model, torch.randn(2, 5, 6))
    assert "wide" in {group.name for group in structure.groups}
    for tried, reason in expected.items():
        assert reason in structure.left_out[tried]
    named = {part.module for group in structure.groups for part in group.slices} | {*structure.left_out}
    holders = {key.rpartition(".")[0] or key for key, one in model.named_parameters() if one.dim() > 1}
    assert {holder.removesuffix(".out_proj") for holder in holders} <= named
