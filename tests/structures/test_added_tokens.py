"""Attentions and networks that append tokens without gradients are traced, and lose channels like others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import class_loss
from torch import Tensor, nn
from torch.nn import functional as F

import obc


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.inputs = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **options)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head((x + self.down(F.relu(self.up(x)))).mean(1))


BATCHES = [
    (torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(number)), torch.arange(4)) for number in range(24)
]
OPTIONS = [{"add_zero_attn": True}, {"add_bias_kv": True}, {"add_zero_attn": True, "add_bias_kv": True, "bias": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attentions_with_tokens_of_their_own(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Attention(**options).eval()
    original = copy.deepcopy(model)
    result = obc.prune(
        model, BATCHES[0][0], BATCHES, class_loss, macs=0.45, steps=2, criterion="l2", allocation="uniform",
        progress=False,
    )  # fmt: skip
    assert not any("Torch-Pruning" in warning for warning in result.report.warnings)
    kept = result.plan["inputs"].out_channels
    assert kept is not None
    assert model.attention.embed_dim == len(kept) < 16
    masked = copy.deepcopy(original).double()
    gone = torch.ones(16, dtype=torch.bool).index_fill(0, kept, False)
    with torch.no_grad():
        for layer in (masked.inputs, masked.attention.out_proj, masked.down):
            layer.weight[gone] = 0
            if layer.bias is not None:
                layer.bias[gone] = 0
        units = result.plan["up"].out_channels
        assert units is not None
        idle = torch.ones(24, dtype=torch.bool).index_fill(0, units, False)
        masked.down.weight[:, idle] = 0
        rows = result.plan["attention"].out_channels  # of queries, keys and values
        assert rows is not None
        lost = torch.ones(16, dtype=torch.bool).index_fill(0, rows[rows < 16], False)
        for part in range(3):
            masked.attention.in_proj_weight[16 * part : 16 * part + 16][lost] = 0
            if masked.attention.in_proj_bias is not None:
                masked.attention.in_proj_bias[16 * part : 16 * part + 16][lost] = 0
        for extra in (masked.attention.bias_k, masked.attention.bias_v):
            if extra is not None:
                extra[..., lost] = 0
        # The product is divided by the root of the head's width, which is smaller now.
        scale = (original.attention.head_dim / model.attention.head_dim) ** 0.5
        masked.attention.in_proj_weight[:16] *= scale
        if masked.attention.in_proj_bias is not None:
            masked.attention.in_proj_bias[:16] *= scale
        for inputs, _ in BATCHES[:3]:
            torch.testing.assert_close(model(inputs).double(), masked(inputs.double()), rtol=1e-4, atol=1e-5)
