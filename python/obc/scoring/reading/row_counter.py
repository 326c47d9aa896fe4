"""Counts of rows, kept on the device: ending a row reads nothing back, so that it can be captured in a CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Count:
    """What a tally held when it was read.

    Attributes:
        ended: rows ended since the scorer was made, several samples being one.
        read: rows, or samples, that were read.
        left_out: how many of them were not finite, not named yet.
        row, sample, entry: of the first of those: its row, its sample, and the first entry that was not finite.
    """

    ended: int
    read: int
    left_out: int
    row: int
    sample: int
    entry: int


class Tally:
    """Counts rows on ``device``."""

    def __init__(self, device: torch.device, ended: int = 0, read: int = 0) -> None:
        self._counts = torch.tensor([ended, read, 0, 0, 0, 0], device=device)

    def add(self, bad: Tensor, entries: Tensor, all_left_out: bool = False) -> None:
        """Count one row.

        Args:
            bad: (samples,) bool, which were not finite; one for a batch row.
            entries: (samples,) int64, the first entry of each that was not.
            all_left_out: the finite samples are left out too.
        """
        counts = self._counts
        left_out = bad.numel() if all_left_out else bad.sum()
        sample = bad.to(torch.uint8).argmax().reshape(1)
        first = torch.cat([counts[:1], sample, entries.gather(0, sample)])
        is_first = bad.any() & (counts[2] == 0)
        counts[3:] = torch.where(is_first, first, counts[3:])
        counts[0] += 1
        counts[1] += bad.numel()
        counts[2] += left_out

    def read(self) -> Count:
        """The counts so far."""
        return Count(*self._counts.tolist())

    def forget_left_out(self) -> None:
        """What was left out has been named: count it from here on anew."""
        self._counts[2] = 0
