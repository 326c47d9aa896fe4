"""Routers that let a token skip its expert name one nevertheless, with the weight zero (Zaya)."""

from __future__ import annotations

from typing import Any

import torch
import transformers_families as families
from torch import Tensor, nn

import obc


class Skipping(nn.Module):
    """The experts of a mixture, called as a router that skips would."""

    def __init__(self, experts: nn.Module, weights: Tensor) -> None:
        super().__init__()
        self.experts, self.weights = experts, weights

    def forward(self, hidden: Tensor) -> Any:
        indices = torch.tensor([[0], [1], [0], [1], [0]])
        return self.experts(hidden, indices, self.weights)


def test_tokens_of_weight_zero_are_not_routed() -> None:
    experts = families.FAMILIES["mixtral"]().model.get_submodule("model.layers.0.mlp.experts")
    hidden = torch.randn(5, experts.gate_up_proj.shape[-1])
    weights = torch.tensor([[0.0], [0.5], [0.25], [1.0], [0.0]])
    model = Skipping(experts, weights)
    there = obc.collect(model, [hidden], statistics=["experts", "moments", "gram"])
    assert there.experts["experts"].count[:2].tolist() == [1.0, 2.0]
    assert there.moments["experts[0]"].count == 1
    gate, up = (hidden[2] @ experts.gate_up_proj[0].T).chunk(2)
    inner = nn.functional.silu(gate) * up
    torch.testing.assert_close(there.gram["experts[0]"].total, torch.outer(inner, inner).double(), rtol=1e-5, atol=1e-6)
    norm = (experts.down_proj[0] @ inner).norm().double()
    torch.testing.assert_close(there.experts["experts"].gate_norm[0], 0.25 * norm, rtol=1e-5, atol=1e-6)
