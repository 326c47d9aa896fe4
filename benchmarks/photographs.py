"""Photographs that packages carry, and crops of them: scikit-learn's, scikit-image's and matplotlib's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.efficientnet_lite import DEVIATION, MEAN, SIZE
from obc.demo.pretrained import package_folder

INSTALL = "pip install scikit-learn scikit-image matplotlib pillow"
# Calibration and test never share a photograph.
CALIBRATION = ("sklearn/china.jpg", "skimage/coffee.png", "skimage/astronaut.png", "skimage/motorcycle_left.png")
CALIBRATION += ("skimage/camera.png", "skimage/coins.png")
TEST = ("sklearn/flower.jpg", "skimage/chelsea.png", "skimage/rocket.jpg", "matplotlib/grace_hopper.jpg")
TEST += ("skimage/clock_motion.png", "skimage/ihc.png")
_FOLDERS = {"sklearn": "datasets/images", "skimage": "data", "matplotlib": "mpl-data/sample_data"}
_SMALLEST = 0.15  # a crop's share of the shorter side, at least


def halves() -> tuple[list[Tensor], list[Tensor]]:
    """(3, H, W) uint8 photographs to calibrate with, and others to test with.

    Raises:
        ImportError: a package is not installed; says how to get it.
    """
    return [_read(name) for name in CALIBRATION], [_read(name) for name in TEST]


def _read(name: str) -> Tensor:
    package, _, file = name.partition("/")
    path: Path = package_folder(package, INSTALL) / _FOLDERS[package] / file
    package_folder("PIL", INSTALL)
    import numpy
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1)


def crops(photos: Sequence[Tensor], batches: int, size: int, seed: int) -> list[Tensor]:
    """Batches of (size, 3, 224, 224) normalised crops of the photographs in turn, placed and scaled by the seed."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def crop(photo: Tensor) -> Tensor:
        side = round(min(photo.shape[1:]) * uniform(_SMALLEST, 1.0))
        top, left = (round(uniform(0, total - side)) for total in photo.shape[1:])
        part = photo[:, top : top + side, left : left + side].float()[None]
        resized = F.interpolate(part, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)[0]
        return (resized.flip(2) if uniform(0, 1) < 0.5 else resized).sub(MEAN).div(DEVIATION)

    return [
        torch.stack([crop(photos[(batch * size + place) % len(photos)]) for place in range(size)])
        for batch in range(batches)
    ]
