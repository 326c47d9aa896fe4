"""Training and evaluation of the demo's networks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from obc import quality
from obc.demo.data import Split


def train(
    model: nn.Module,
    split: Split,
    *,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
    parameters: Iterable[Any] | None = None,
) -> nn.Module:
    """Train ``model`` in place with AdamW on a one-cycle schedule; returns it in eval mode.

    The order of the batches follows ``seed``, so two runs on one machine agree. ``parameters`` are the model's, or
    parameter groups for the optimizer.
    """
    generator = torch.Generator().manual_seed(seed)
    trained = model.parameters() if parameters is None else parameters
    optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=weight_decay)
    steps = epochs * -(-len(split) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for images, labels in split.batches(batch_size, generator):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: nn.Module, split: Split) -> float:
    """The share of ``split`` that ``model``, in eval mode, classifies correctly. The training flags are kept."""
    return quality.accuracy(model, split.batches(256))
