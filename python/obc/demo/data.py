"""scikit-learn's handwritten digits in three splits, determined by the seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

VALIDATION_IMAGES = 200
TEST_IMAGES = 500
PIXEL_MAXIMUM = 16  # scikit-learn's digits count 0 to 16 per pixel


@dataclass(frozen=True)
class Split:
    """Images (N, 1, 8, 8), float32 in [-1, 1], and their labels (N,), int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (images, labels) of ``size``, the last one smaller; in random order if there is a generator."""
        order = (
            torch.arange(len(self), device="cpu")
            if generator is None
            else torch.randperm(len(self), generator=generator, device="cpu")
        )
        for chosen in order.split(size):
            yield self.images[chosen], self.labels[chosen]


@dataclass(frozen=True)
class Digits:
    """``train`` is for training and scoring, ``validation`` watches training, ``test`` is for evaluation only."""

    train: Split
    validation: Split
    test: Split


def digits(seed: int = 0) -> Digits:
    """The 1797 digits, shuffled by ``seed``: 500 for test, 200 for validation, the rest for training; needs sklearn."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / (PIXEL_MAXIMUM / 2) - 1
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed), device="cpu")
    sizes = [len(labels) - VALIDATION_IMAGES - TEST_IMAGES, VALIDATION_IMAGES, TEST_IMAGES]
    return Digits(*(Split(images[chosen], labels[chosen]) for chosen in order.split(sizes)))
