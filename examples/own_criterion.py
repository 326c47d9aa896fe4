"""A criterion of your own, against the Jacobian Criterion and random selection, under one budget.

python examples/own_criterion.py [--macs 0.6] [--epochs 8]
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import obc


def activation_energy(group: Any, statistics: obc.Statistics, model: nn.Module) -> Tensor:
    """S_u = sum over the channels c of unit u, as every layer that reads them gets them, of E[x_c^2]."""
    scores = torch.zeros(group.size, dtype=torch.float64)
    for part in group.consumers:
        moments = statistics.moments[part.module]
        scores += (moments.square / moments.count)[part.channels].sum(1)
    return scores


activation_energy.needs = ("moments",)  # type: ignore[attr-defined]  # what obc.prune is to collect for it


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of a batch of (images, labels)."""
    return F.cross_entropy(model(batch[0]), batch[1])


def trained(batches: list[tuple[Tensor, Tensor]], epochs: int) -> nn.Module:
    """A small network for 8 x 8 digits."""
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    return model.eval()


def main() -> None:
    """Train once, prune three copies, print what each kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--macs", type=float, default=0.6, help="the share of multiply-accumulates that remains")
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    batches = list(zip(images[:1200].split(16), labels[:1200].split(16), strict=True))
    test = [(images[1200:], labels[1200:])]
    model = trained(batches, arguments.epochs)
    print(f"unpruned: accuracy {obc.quality.accuracy(model, test):.3f}")
    for criterion in (activation_energy, "jacobian", "random"):
        pruned = copy.deepcopy(model)
        result = obc.prune(
            pruned, images[:1], batches, loss_fn, macs=arguments.macs, criterion=criterion, steps=4, progress=False
        )
        name = result.report.provenance["criterion"]
        print(f"{name}: accuracy {obc.quality.accuracy(pruned, test):.3f}, widths {result.report.widths}")


if __name__ == "__main__":
    main()
