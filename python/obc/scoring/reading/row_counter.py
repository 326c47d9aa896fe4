"""Counts the rows that were read and names those left out; on the device, so that a CUDA graph can capture a row."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from obc.scoring.errors import ScoringError
from obc.scoring.reading.flat_row import EndedRow, FlatRow


@dataclass(frozen=True)
class Count:
    """The counts of one device, on the host.

    Attributes:
        ended: rows ended since the scorer was made; a batch of samples counts once.
        read: rows, or samples, that were read.
        unnamed: how many of them were not finite and have not been named yet.
        row, sample: where the first of those was read.
    """

    ended: int
    read: int
    unnamed: int
    row: int
    sample: int


class RowCounter:
    """Counts rows and names those left out.

    Args:
        per_sample: each sample is a row.
        strict: raise at a row that is not finite, instead of warning.

    Attributes:
        left_out: one line for each row, or run of rows, that was left out.
    """

    def __init__(self, flats: Sequence[FlatRow], per_sample: bool, strict: bool) -> None:
        self.left_out: list[str] = []
        self._flats, self._per_sample, self._strict = list(flats), per_sample, strict
        self._counts = torch.zeros(5, dtype=torch.int64, device=flats[0].device)
        self._on_host = all(flat.device.type == "cpu" for flat in flats)
        self._faulty = [torch.zeros_like(flat.scores) for flat in flats]
        self._num_left_out = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the counters on devices."""
        return sum(faulty.nbytes for faulty in self._faulty)

    def add(self, ended: EndedRow, dropped: bool = False) -> None:
        """Count a row, if ``dropped`` with all its samples as left out; reads nothing from a GPU."""
        samples = ended.finite.numel()
        if self._on_host and not dropped and all(ended.finite.tolist()):
            self._counts += torch.tensor([1, samples, 0, 0, 0], device="cpu")  # what follows waits for no GPU
            return
        counts, sample = self._counts, ended.faulty_sample()
        is_first = ~ended.finite.all() & (counts[2] == 0)
        for faulty, values in zip(self._faulty, ended.values, strict=True):
            found = values.index_select(1, sample.to(values.device))[:, 0]
            torch.where(is_first.to(values.device), found, faulty, out=faulty)
        counts[3:] = torch.where(is_first, torch.cat([counts[:1], sample]), counts[3:])
        counts[0] += 1
        counts[1] += samples
        counts[2] += samples if dropped else (~ended.finite).sum()

    def read(self) -> Count:
        """The counts so far. Reads from the device."""
        return Count(*self._counts.tolist())

    def count(self) -> int:
        """Rows, or samples, that were added to the scores. Reads from the device and names those left out."""
        self.name_faults()
        return self.read().read - self._num_left_out

    def count_left_out(self) -> int:
        """Rows, or samples, left out because they were not finite. Reads from the device and names them."""
        self.name_faults()
        return self._num_left_out

    def row(self) -> str:
        """The current row, for messages. Reads from the device."""
        return f"row {self.read().ended}"

    def name_faults(self) -> None:
        """Name the rows that were not finite since the last call. Reads from the device.

        Raises:
            ScoringError: there are some, and the scorer is strict.
        """
        count = self.read()
        if not count.unnamed:
            return
        self._counts[2] = 0
        self._num_left_out += count.unnamed
        row = f"row {count.row}, sample {count.sample}" if self._per_sample else f"row {count.row}"
        more = f" (and {count.unnamed - 1} more)" if count.unnamed > 1 else ""
        message = f"{row} is not finite, first in {self._first_fault()!r}, and was left out{more}"
        self.left_out.append(message)
        if self._strict:
            raise ScoringError(f"strict: {message}")
        warnings.warn(message, stacklevel=6)

    def _first_fault(self) -> str:
        for flat, faulty in zip(self._flats, self._faulty, strict=True):
            if (label := flat.first_fault(faulty)) is not None:
                return label
        raise AssertionError("a row that is not finite has an entry that is not")

    def load(self, ended: int, read: int, left_out: Sequence[str]) -> None:
        """Restore the counts of an earlier run."""
        self._counts.copy_(torch.tensor([ended, read, 0, 0, 0], device="cpu"))
        self._num_left_out, self.left_out = 0, list(left_out)
