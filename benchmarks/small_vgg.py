"""A small VGG for handwritten digits, beside the demo's networks: a flatten before its linear layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from obc.demo.models import CLASSES, IMAGE_SIZE


class VGG(nn.Module):
    """Plain stages of conv - norm - ReLU with max-pooling between them; a flatten before two linear layers."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64), convs: int = 2, hidden: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for stage, width in enumerate(widths):
            if stage > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convs):
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                channels = width
        self.features = nn.Sequential(*layers)
        side = IMAGE_SIZE // 2 ** (len(widths) - 1)
        self.classifier = nn.Sequential(nn.Linear(channels * side**2, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))

    def unpruned_layers(self) -> list[nn.Module]:
        """The layers whose outputs keep their width when the network is pruned."""
        return [self.classifier[-1]]

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        return self.classifier(self.features(x).flatten(1))
