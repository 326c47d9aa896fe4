"""Prune a small YOLO-like detector: stages that split and join channels, and a head on two scales.

python examples/prune_detector.py [--macs 0.6]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import obc


class ConvBlock(nn.Sequential):
    """Convolution, BatchNorm, SiLU."""

    def __init__(self, channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> None:
        conv = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.SiLU())


class CrossStage(nn.Module):
    """Two 1 x 1 branches, one of them refined with a shortcut, joined by a third convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.left, self.right = ConvBlock(channels, half, 1), ConvBlock(channels, half, 1)
        self.refine = nn.Sequential(ConvBlock(half, half), ConvBlock(half, half))
        self.join = ConvBlock(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) in and out."""
        right = self.right(x)
        return self.join(torch.cat([self.left(x), right + self.refine(right)], 1))


class Detector(nn.Module):
    """Two scales; each predicts boxes, objectness and classes per cell."""

    def __init__(self, outputs: int = 4 + 1 + 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvBlock(3, 16, stride=2), ConvBlock(16, 32, stride=2), CrossStage(32))
        self.deeper = nn.Sequential(ConvBlock(32, 64, stride=2), CrossStage(64))
        self.lateral = ConvBlock(64, 32, 1)
        self.merge = ConvBlock(64, 32)
        self.fine, self.coarse = nn.Conv2d(32, outputs, 1), nn.Conv2d(64, outputs, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions on a fine and on a coarse grid."""
        fine = self.stem(images)
        coarse = self.deeper(fine)
        upsampled = F.interpolate(self.lateral(coarse), scale_factor=2.0)
        return self.fine(self.merge(torch.cat([fine, upsampled], 1))), self.coarse(coarse)


def loss_fn(model: nn.Module, batch: tuple[Tensor, tuple[Tensor, Tensor]]) -> Tensor:
    """Squared error of both grids; a real detector's loss goes here."""
    images, wanted = batch
    return sum((F.mse_loss(grid, target) for grid, target in zip(model(images), wanted, strict=True)), torch.zeros(()))


def main() -> None:
    """Prune, and print what every layer kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--macs", type=float, default=0.6)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = Detector().eval()
    batches = [(torch.randn(4, 3, 64, 64), (torch.randn(4, 8, 16, 16), torch.randn(4, 8, 8, 8))) for _ in range(16)]
    result = obc.prune(model, batches[0][0], batches, loss_fn, macs=arguments.macs, steps=2)
    print(result.report)
    print([tuple(grid.shape) for grid in model(batches[0][0])])


if __name__ == "__main__":
    main()
