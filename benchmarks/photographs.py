"""Images that packages carry, to calibrate and to test an ImageNet classifier with; no photograph serves both.

Calibration: photographic cut-outs of animals, plants, food and things (tuxpaint's stamps), each pasted on a crop of a
photograph (scikit-learn's, scikit-image's and matplotlib's). There are hundreds of motifs: a handful of photographs
would let pruning and regression fit those alone.

Test: crops of the 20 photographs of ImageNet that foolbox carries, on which a classifier is sure of itself. (Crops of
tissue, or of a blurred clock, have no class: noise of 5 % in the logits' energy already changes every seventh answer.)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.efficientnet_lite import DEVIATION, MEAN, SIZE
from obc.demo.pretrained import package_folder

INSTALL = "pip install scikit-learn scikit-image matplotlib pillow"
IMAGENET = "pip install --no-deps foolbox"
STAMPS = Path("/usr/share/tuxpaint/stamps")
_BACKGROUNDS = ("sklearn/china.jpg", "sklearn/flower.jpg", "skimage/coffee.png", "skimage/astronaut.png")
_BACKGROUNDS += ("skimage/motorcycle_left.png", "skimage/camera.png", "skimage/coins.png", "skimage/chelsea.png")
_BACKGROUNDS += ("skimage/rocket.jpg", "matplotlib/grace_hopper.jpg", "skimage/clock_motion.png", "skimage/ihc.png")
_FOLDERS = {"sklearn": "datasets/images", "skimage": "data", "matplotlib": "mpl-data/sample_data"}
# Stamps that are drawn.
_DRAWN = ("cartoon", "symbols", "flags", "roadsigns", "seasonal", "_mirror")
# A crop's share of the shorter side, at least; a stamp's longer side in crops.
_SMALLEST_BACKGROUND, _SMALLEST_TEST = 0.3, 0.6
_STAMP_SIZES = (0.55, 1.05)


def calibration_batches(batches: int, size: int, seed: int) -> list[Tensor]:
    """Batches of (size, 3, 224, 224) normalised images; a stamp comes again once all others had their turn.

    Raises:
        ImportError: a package is not installed; says how to get it.
        FileNotFoundError: likewise tuxpaint's stamps.
    """
    stamps = [path for path in sorted(STAMPS.rglob("*.png")) if not any(word in str(path) for word in _DRAWN)]
    if not stamps:
        raise FileNotFoundError(f"{STAMPS} has no stamps; get them with: apt-get install tuxpaint-stamps-default")
    drawing = random.Random(seed)
    drawing.shuffle(stamps)
    backgrounds = [_background(name) for name in _BACKGROUNDS]
    images = [
        _pasted(
            _crop(backgrounds[place % len(backgrounds)], _SMALLEST_BACKGROUND, drawing),
            stamps[place % len(stamps)],
            drawing,
        )
        for place in range(batches * size)
    ]
    return list(torch.stack(images).sub(MEAN).div(DEVIATION).split(size))


def test_batches(batches: int, size: int, seed: int) -> list[Tensor]:
    """Batches of (size, 3, 224, 224) normalised crops of the photographs of ImageNet in turn.

    Raises:
        ImportError: foolbox is not installed; says how to get it.
    """
    folder = package_folder("foolbox", IMAGENET) / "data"
    photographs = [_opened(path) for path in sorted(folder.glob("imagenet_*.jpg"))]
    drawing = random.Random(seed)
    images = [_crop(photographs[place % len(photographs)], _SMALLEST_TEST, drawing) for place in range(batches * size)]
    return list(torch.stack(images).sub(MEAN).div(DEVIATION).split(size))


def _background(name: str) -> Tensor:
    package, _, file = name.partition("/")
    return _opened(package_folder(package, INSTALL) / _FOLDERS[package] / file)


def _opened(path: Path) -> Tensor:
    """(3, H, W) uint8."""
    return _pixels(path, "RGB")


def _pixels(path: Path, mode: str, size: int | None = None) -> Tensor:
    """(channels, H, W) uint8; cut to what is not transparent and resized so that the longer side is ``size``."""
    package_folder("PIL", INSTALL)
    import numpy
    from PIL import Image

    with Image.open(path) as opened:
        image: Any = opened.convert(mode)
    if size is not None:
        image = image.crop(image.getbbox())
        factor = size / max(image.size)
        image = image.resize(tuple(max(1, round(side * factor)) for side in image.size), Image.Resampling.BICUBIC)
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


def _crop(photograph: Tensor, smallest: float, drawing: random.Random) -> Tensor:
    """A (3, 224, 224) square of the photograph, perhaps mirrored, 0 to 255."""
    side = round(min(photograph.shape[1:]) * drawing.uniform(smallest, 1.0))
    top, left = (drawing.randint(0, total - side) for total in photograph.shape[1:])
    part = photograph[:, top : top + side, left : left + side].float()[None]
    resized = F.interpolate(part, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)[0]
    return resized.flip(2) if drawing.random() < 0.5 else resized


def _pasted(image: Tensor, stamp: Path, drawing: random.Random) -> Tensor:
    """The image with the stamp somewhere in it, perhaps mirrored, perhaps a little larger than the image."""
    pixels = _pixels(stamp, "RGBA", round(SIZE * drawing.uniform(*_STAMP_SIZES))).float()
    pixels = pixels.flip(2) if drawing.random() < 0.5 else pixels
    places = [drawing.randint(min(0, SIZE - side), max(0, SIZE - side)) for side in pixels.shape[1:]]
    starts, ends = _overlap(places, pixels.shape[1:])
    (top, left), (bottom, right) = starts, ends
    part = pixels[:, top - places[0] : bottom - places[0], left - places[1] : right - places[1]]
    opacity = part[3:] / 255
    image[:, top:bottom, left:right] = image[:, top:bottom, left:right] * (1 - opacity) + part[:3] * opacity
    return image


def _overlap(places: Sequence[int], sides: Sequence[int]) -> tuple[list[int], list[int]]:
    """Where in the image what is put at ``places`` begins and ends."""
    starts = [max(place, 0) for place in places]
    return starts, [min(SIZE, place + side) for place, side in zip(places, sides, strict=True)]
