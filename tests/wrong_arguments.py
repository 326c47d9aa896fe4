"""The network, batch and loss beside which tests pass arguments that are wrong."""

from __future__ import annotations

import torch
from torch import Tensor, nn

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()
