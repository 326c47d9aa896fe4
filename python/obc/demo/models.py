"""The demo's networks: a small ResNet and a small vision transformer, wider than handwritten digits need.

All take (N, 1, 8, 8) images and return (N, classes) logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SIZE = 8
CLASSES = 10


class ResidualBlock(nn.Module):
    """conv - norm - ReLU - conv - norm, added to the input, or to its 1x1 convolution if the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in, H, W) to (N, out, H / stride, W / stride)."""
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResidualCNN(nn.Module):
    """A ResNet for 8x8 images: a stem, and for each of ``widths`` a stage of residual blocks.

    Each stage after the first has half the image size of the one before.
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64), blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        layers = []
        channels = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(ResidualBlock(channels, width, stride=2 if stage > 0 and block == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(channels, CLASSES)

    def unpruned_layers(self) -> list[nn.Module]:
        """The layers whose outputs keep their width when the network is pruned."""
        return [self.head]

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class SelfAttention(nn.Module):
    """Multi-head self-attention; the number of heads follows the projections' width, so whole heads can be pruned."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) to the same shape."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        weights = (query @ key.transpose(-1, -2) * self.head_width**-0.5).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def unpruned_layers(self) -> list[nn.Module]:
        """The attention, and the layer that returns to the residual stream."""
        return [self.attention, self.mlp[-1]]

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """A vision transformer: linear patch embedding, learnt positions, pre-norm layers, the mean over all patches."""

    positions: Tensor

    def __init__(self, width: int = 32, heads: int = 4, hidden: int = 128, layers: int = 3, patch: int = 2) -> None:
        if width % heads or IMAGE_SIZE % patch:
            raise ValueError(f"width {width} must be divisible by heads {heads}, and {IMAGE_SIZE} by patch {patch}")
        super().__init__()
        self.patch = patch
        patches = (IMAGE_SIZE // patch) ** 2
        self.embed = nn.Linear(patch**2, width)
        self.position = nn.Embedding(patches, width)
        self.layers = nn.Sequential(*[EncoderLayer(width, heads, hidden) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)
        self.register_buffer("positions", torch.arange(patches, device="cpu"), persistent=False)

    def unpruned_layers(self) -> list[nn.Module]:
        """All but the first layer of each feed-forward network, whose hidden units are pruned."""
        kept: list[nn.Module] = [self.embed, self.position, self.head]
        for layer in self.layers:
            assert isinstance(layer, EncoderLayer)
            kept += layer.unpruned_layers()
        return kept

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        patches = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        tokens = self.layers(self.embed(patches) + self.position(self.positions))
        return self.head(self.norm(tokens).mean(1))
