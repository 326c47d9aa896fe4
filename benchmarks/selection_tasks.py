"""The two tasks of bench_selection, both of 8x8 images: handwritten digits, and 40 generated classes of textures.

A texture class is a sum of three gratings, cos(2 pi (f . position + phase)), with frequencies f of one to three cycles
in either direction and phases relative to each other that belong to the class; frequencies come from a small pool, so
that classes share gratings and only their combination tells them apart. An image shifts the whole pattern by a random
number of pixels in both directions (cyclically), scales it by 0.5 to 1.5, and adds Gaussian noise. Everything follows
from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from obc.demo.data import Digits, Split, digits

SIZE = 8
TEXTURE_CLASSES = 40
GRATINGS = 3
POOL = 10  # frequencies that all classes draw from
NOISE = 0.5  # standard deviation; the pattern's own is about 1.2 at contrast 1
TRAINING, VALIDATION, TEST = 3000, 500, 1000


@dataclass(frozen=True)
class Task:
    """A name, how many classes there are, and the splits of a seed."""

    name: str
    classes: int
    splits: Callable[[int], Digits]


def textures(seed: int = 0) -> Digits:
    """The texture classes and their images; as many of every class."""
    generator = torch.Generator().manual_seed(1000 + seed)
    patterns = torch.stack([_pattern(generator) for _ in range(TEXTURE_CLASSES)])
    return Digits(*(_images(patterns, count, generator) for count in (TRAINING, VALIDATION, TEST)))


def _pattern(generator: torch.Generator) -> Tensor:
    """(8, 8) one class."""
    cycles = torch.cartesian_prod(torch.arange(-3, 4), torch.arange(0, 4))[1:]
    pool = cycles[torch.linspace(0, len(cycles) - 1, POOL).long()]
    chosen = pool[torch.randperm(POOL, generator=generator)[:GRATINGS]]
    phases = torch.rand(GRATINGS, generator=generator)
    place = torch.arange(SIZE) / SIZE
    angles = chosen[:, 0, None, None] * place[:, None] + chosen[:, 1, None, None] * place + phases[:, None, None]
    return (2 * math.pi * angles).cos().sum(0)


def _images(patterns: Tensor, count: int, generator: torch.Generator) -> Split:
    labels = torch.arange(count) % len(patterns)
    shifts = torch.randint(0, SIZE, (count, 2), generator=generator)
    rows = (torch.arange(SIZE) + shifts[:, :1]) % SIZE
    columns = (torch.arange(SIZE) + shifts[:, 1:]) % SIZE
    images = patterns[labels[:, None, None], rows[:, :, None], columns[:, None, :]]
    contrast = 0.5 + torch.rand(count, 1, 1, generator=generator)
    noisy = images * contrast + NOISE * torch.randn(images.shape, generator=generator)
    order = torch.randperm(count, generator=generator)
    return Split(noisy[order, None], labels[order])


TASKS = (Task("digits", 10, digits), Task("textures", TEXTURE_CLASSES, textures))
