"""Prune an image classifier to half of its multiply-accumulates, compensate it, and fine-tune it for a moment.

python examples/prune_image_model.py [--macs 0.5] [--epochs 8]
"""

from __future__ import annotations

import argparse
import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import obc


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of a batch of (images, labels)."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def network() -> nn.Module:
    """A small convolutional network for 8 x 8 images."""

    def block(channels: int, wider: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, wider, 3, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*block(1, 32), *block(32, 64), nn.MaxPool2d(2), *block(64, 64), *head)


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], epochs: int, lr: float) -> None:
    """A few epochs of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    model.train()
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    model.eval()


def main() -> None:
    """Train, prune, print, fine-tune, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--macs", type=float, default=0.5, help="the share of multiply-accumulates that remains")
    parser.add_argument("--epochs", type=int, default=8, help="of training before pruning")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    batches = list(zip(images[:1200].split(16), labels[:1200].split(16), strict=True))
    test = [(images[1200:], labels[1200:])]

    model = network()
    train(model, batches, arguments.epochs, lr=1e-3)
    original = copy.deepcopy(model)
    print(f"unpruned: accuracy {obc.quality.accuracy(model, test):.3f}")

    result = obc.prune(model, images[:1], batches, loss_fn, macs=arguments.macs, compensate="ls")
    print(result.report)
    print(f"pruned: accuracy {obc.quality.accuracy(model, test):.3f}")
    print(f"agrees with the unpruned network on {obc.quality.agreement(model, original, test):.1%} of the images")

    train(model, batches, epochs=2, lr=1e-4)
    print(f"fine-tuned: accuracy {obc.quality.accuracy(model, test):.3f}")
    result.plan.save("plan.json")


if __name__ == "__main__":
    main()
