"""Images that packages carry, to calibrate and to test an ImageNet classifier with; no photograph serves both.

Calibration: photographic cut-outs of animals, plants, food and things (tuxpaint's stamps), each pasted on a crop of a
photograph (scikit-learn's, scikit-image's and matplotlib's). There are hundreds of motifs: a handful of photographs
would let pruning and regression fit those alone. Or half of them such images and half crops of 71 photographs: those
backgrounds, tuxpaint's templates, and what GCompris shows in activities that test nothing here.

Test: 230 photographs of animals, buildings, tools and household things from GCompris, an educational program, and the
20 of ImageNet that foolbox carries. Each comes once before any comes again.

Development, to choose among methods without the test photographs: every third cut-out and every third calibration
photograph is kept apart; the others calibrate.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.efficientnet_lite import DEVIATION, MEAN, SIZE
from obc.demo.pretrained import package_folder

INSTALL = "pip install scikit-learn scikit-image matplotlib pillow"
IMAGENET = "pip install --no-deps foolbox"
GCOMPRIS = Path("/usr/share/gcompris-qt/rcc")
# Qt's resource files, which hold many images one after another, and what of them are photographs of one thing.
_RESOURCES = (
    "categorization",
    "details",
    "erase",
    "explore_farm_animals",
    "explore_monuments",
    "explore_world_animals",
)
# Likewise, to calibrate with.
_CALIBRATION_RESOURCES = ("babyshapes", "clickgame", "explore_world_music", "louis-braille", "paintings")
TEMPLATES = Path("/usr/share/tuxpaint/templates")
_WEBP = re.compile(rb"RIFF....WEBP", re.DOTALL)
_SMALLEST_PHOTOGRAPH = 200  # pixels of the shorter side; smaller ones are icons
STAMPS = Path("/usr/share/tuxpaint/stamps")
Part = Literal["all", "rest", "development"]
_DEVELOPMENT = 3  # one cut-out and one photograph in so many is kept for development
_BACKGROUNDS = ("sklearn/china.jpg", "sklearn/flower.jpg", "skimage/coffee.png", "skimage/astronaut.png")
_BACKGROUNDS += ("skimage/motorcycle_left.png", "skimage/camera.png", "skimage/coins.png", "skimage/chelsea.png")
_BACKGROUNDS += ("skimage/rocket.jpg", "matplotlib/grace_hopper.jpg", "skimage/clock_motion.png", "skimage/ihc.png")
_FOLDERS = {"sklearn": "datasets/images", "skimage": "data", "matplotlib": "mpl-data/sample_data"}
# Stamps that are drawn.
_DRAWN = ("cartoon", "symbols", "flags", "roadsigns", "seasonal", "_mirror")
# A crop's share of the shorter side, at least; a stamp's longer side in crops.
_SMALLEST_BACKGROUND, _SMALLEST_TEST = 0.3, 0.6
_STAMP_SIZES = (0.55, 1.05)
_Source = TypeVar("_Source")


def calibration_batches(batches: int, size: int, seed: int, crops: bool = False, part: Part = "all") -> list[Tensor]:
    """Batches of (size, 3, 224, 224) normalised images; a stamp comes again once all others had their turn.

    Args:
        batches: so many.
        size: images in each.
        seed: of what is drawn.
        crops: every second image is a crop of a photograph instead.
        part: which cut-outs and photographs: all, those kept for development, or the rest.

    Raises:
        ImportError: a package is not installed; says how to get it.
        FileNotFoundError: likewise tuxpaint's stamps and templates, and GCompris's data.
    """
    stamps = [path for path in sorted(STAMPS.rglob("*.png")) if not any(word in str(path) for word in _DRAWN)]
    if not stamps:
        raise FileNotFoundError(f"{STAMPS} has no stamps; get them with: apt-get install tuxpaint-stamps-default")
    stamps = of_part(stamps, part)
    drawing = random.Random(seed)
    drawing.shuffle(stamps)
    backgrounds = [_background(name) for name in of_part(_BACKGROUNDS, part)]
    images = [
        _pasted(
            _crop(backgrounds[place % len(backgrounds)], _SMALLEST_BACKGROUND, drawing),
            _in_turn(stamps, place),
            drawing,
        )
        for place in range(batches * size)
    ]
    if crops:
        photographs = [*backgrounds, *map(_opened, of_part(_calibration_sources(), part))]
        drawing.shuffle(photographs)
        images[1::2] = [
            _crop(photographs[place % len(photographs)], _SMALLEST_TEST, drawing) for place in range(len(images[1::2]))
        ]
    return list(torch.stack(images).sub(MEAN).div(DEVIATION).split(size))


def _in_turn(sources: Sequence[_Source], place: int) -> _Source:
    """The source whose turn it is; of an even number each lap begins one later, so that every second place has all."""
    lap = 0 if len(sources) % 2 else place // len(sources)
    return sources[(place + lap) % len(sources)]


def of_part(sources: Sequence[_Source], part: Part) -> list[_Source]:
    """Those of ``sources`` that belong to the part."""
    return [
        source
        for place, source in enumerate(sources)
        if part == "all" or (part == "development") == (place % _DEVELOPMENT == 0)
    ]


def _calibration_sources() -> list[Path | bytes]:
    """Photographs that serve no test."""
    templates = sorted(TEMPLATES.glob("*.jpg"))
    if not templates:
        raise FileNotFoundError(f"{TEMPLATES} has no photographs; get them with: apt-get install tuxpaint-data")
    return [*templates, *_embedded(_CALIBRATION_RESOURCES)]


def test_batches(batches: int, size: int, seed: int) -> list[Tensor]:
    """Batches of (size, 3, 224, 224) normalised crops of the test photographs, in an order that the seed draws.

    Raises:
        ImportError: foolbox is not installed; says how to get it.
        FileNotFoundError: likewise GCompris's data.
    """
    folder = package_folder("foolbox", IMAGENET) / "data"
    drawing = random.Random(seed)
    sources: list[Path | bytes] = [*sorted(folder.glob("imagenet_*.jpg")), *_embedded(_RESOURCES)]
    drawing.shuffle(sources)
    images = [_crop(_opened(sources[place % len(sources)]), _SMALLEST_TEST, drawing) for place in range(batches * size)]
    return list(torch.stack(images).sub(MEAN).div(DEVIATION).split(size))


def _embedded(resources: Sequence[str]) -> Iterator[bytes]:
    """The photographs in GCompris's resource files: opaque images that are not icons."""
    package_folder("PIL", INSTALL)
    from PIL import Image

    for name in resources:
        path = GCOMPRIS / f"{name}.rcc"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing; get it with: apt-get install gcompris-qt-data")
        content = path.read_bytes()
        for match in _WEBP.finditer(content):
            length = 8 + int.from_bytes(content[match.start() + 4 : match.start() + 8], "little")
            found = content[match.start() : match.start() + length]
            with Image.open(io.BytesIO(found)) as image:
                if image.mode == "RGB" and min(image.size) >= _SMALLEST_PHOTOGRAPH:
                    yield found


def _background(name: str) -> Tensor:
    package, _, file = name.partition("/")
    return _opened(package_folder(package, INSTALL) / _FOLDERS[package] / file)


def _opened(source: Path | bytes) -> Tensor:
    """(3, H, W) uint8."""
    return _pixels(source, "RGB")


def _pixels(source: Path | bytes, mode: str, size: int | None = None) -> Tensor:
    """(channels, H, W) uint8; cropped to the opaque part and resized so that the longer side is ``size``."""
    package_folder("PIL", INSTALL)
    import numpy
    from PIL import Image

    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
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
    """The beginning and end in the image of parts put at ``places``."""
    starts = [max(place, 0) for place in places]
    return starts, [min(SIZE, place + side) for place, side in zip(places, sides, strict=True)]
