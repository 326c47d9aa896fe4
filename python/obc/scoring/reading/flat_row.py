"""The flat vectors that hold one row of scores and the sum of squares, and their slices.

One :class:`FlatRow` per device and accumulation dtype. A gate's ``.grad`` is a slice of it, so autograd adds in
place and ending a row is one ``end_row``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obc import ops


@dataclass(eq=False)
class Slot:
    """The channels ``start:stop`` of a flat row, and the gate whose gradient adds into them.

    Tied weights share one slot, so that the uses of a weight add up before the square.

    Attributes:
        shard: (first, count) of the channels that this process sees; None where it sees all.
        read: False where nobody asked for these channels: only their number is known, no row has entries for them.
    """

    label: str
    flat: FlatRow
    start: int
    stop: int
    gate: Tensor | None = None
    view: Tensor | None = None
    shard: tuple[int, int] | None = None
    read: bool = True

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def local_size(self) -> int:
        """How many channels this process sees."""
        return self.size if self.shard is None else self.shard[1]

    def of(self, flat_vector: Tensor) -> Tensor:
        return flat_vector[self.start : self.stop]

    def _local_of(self, flat_vector: Tensor) -> Tensor:
        return self.of(flat_vector) if self.shard is None else self.of(flat_vector).narrow(0, *self.shard)

    def see(self, first: int, count: int) -> None:
        """From now on gates see the channels from ``first`` on, ``count`` of them."""
        shard = None if count == self.size else (first, count)
        if shard != self.shard:
            self.shard, self.gate, self.view = shard, None, None

    def bind(self) -> None:
        """Give the gate its slice of the row as gradient, for a batch row."""
        if self.gate is None:
            self.gate = torch.zeros(self.local_size, dtype=self.flat.dtype, device=self.flat.device, requires_grad=True)
            self.view = self._local_of(self.flat.row)
        self.gate.grad = self.view

    def bind_samples(self, samples: int) -> None:
        """The same for sample rows: a gate of (samples, channels), laid out like its slice of the row."""
        if self.gate is None or self.gate.shape[0] != samples:
            gate = torch.zeros(self.local_size, samples, dtype=self.flat.dtype, device=self.flat.device)
            self.gate = gate.t().requires_grad_()
            self.view = self._local_of(self.flat.sample_rows(samples)).t()
        self.gate.grad = self.view

    def is_bound(self) -> bool:
        return self.gate is None or self.gate.grad is self.view

    def release(self) -> None:
        self.gate = self.view = None


class FlatRow:
    """One row of r and the sums S of its squares, as flat vectors over all slots of one device and dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.slots: list[Slot] = []
        self.size = 0
        self.row = torch.empty(0)
        self.reference = torch.empty(0)
        self.scores = torch.empty(0)
        self.samples: Tensor | None = None

    def add(self, label: str, size: int) -> Slot:
        slot = Slot(label, self, self.size, self.size + size)
        self.slots.append(slot)
        self.size += size
        return slot

    def allocate(self) -> None:
        """Make the vectors, once every slot is known."""
        self.row = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        self.scores = torch.zeros_like(self.row)

    def sample_rows(self, samples: int) -> Tensor:
        """The (channels, samples) rows, made anew when the number of samples changes."""
        if self.samples is None or self.samples.shape[1] != samples:
            self.samples = torch.zeros(self.size, samples, dtype=self.dtype, device=self.device)
        return self.samples

    def zero(self) -> None:
        self.row.zero_()
        if self.samples is not None:
            self.samples.zero_()

    def release(self) -> None:
        """Let go of everything but the sums."""
        self.samples, self.reference = None, torch.empty(0)
        for slot in self.slots:
            slot.release()

    def rows(self) -> Tensor:
        """The row in hand as (channels, samples), one sample for a batch row."""
        if self.samples is None:
            return self.row[:, None]
        if self.samples.shape[1] == 1:
            # Transient weight gradients have no per-sample form: they serve rows of one sample, where they add here.
            self.samples += self.row[:, None]
            self.row.zero_()
        return self.samples

    def faults(self, loss_scale: float) -> tuple[Tensor, Tensor]:
        """Per sample, whether a square of the row is not finite, and the first entry of which that is so."""
        bad = (self.rows() / loss_scale).square().isfinite().logical_not()
        return bad.any(0), bad.to(torch.uint8).argmax(0)

    def end_row(self, loss_scale: float) -> None:
        """Add the squares of the row, or of each sample's, where they are finite, and clear it, without a host read."""
        if self.samples is None:
            ops.end_row(self.scores, self.row, loss_scale)
            return
        squares = (self.rows() / loss_scale).square()
        finite = squares.isfinite().all(0)
        self.scores += torch.where(finite, squares, torch.zeros_like(squares)).sum(1)
        self.zero()

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors, and of the gates."""
        tensors = [self.row, self.reference, self.scores, self.samples, *(slot.gate for slot in self.slots)]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def label_of(self, index: int) -> str:
        """The slot that holds entry ``index``."""
        return next(slot.label for slot in self.slots if slot.start <= index < slot.stop)


def find_faults(flats: Sequence[FlatRow], loss_scale: float) -> tuple[Tensor, Tensor]:
    """Per sample, whether it is not finite and the first such entry, counted over all vectors.

    A row that lies in several vectors is left out of all of them where one part is not finite.
    """
    faults = [flat.faults(loss_scale) for flat in flats]
    if len(faults) == 1:
        return faults[0]
    bad, entries, before = torch.zeros_like(faults[0][0]), torch.zeros_like(faults[0][1]), 0
    for flat, (part, part_entries) in zip(flats, faults, strict=True):
        part = part.to(bad.device)
        entries = torch.where(bad | ~part, entries, before + part_entries.to(bad.device))
        bad, before = bad | part, before + flat.size
    for flat in flats:
        flat.rows()[:, bad.to(flat.device)] = float("nan")
    return bad, entries


def label_of(flats: Sequence[FlatRow], entry: int) -> str:
    """The slot that holds ``entry``, counted over all vectors."""
    for flat in flats:
        if entry < flat.size:
            return flat.label_of(entry)
        entry -= flat.size
    raise AssertionError("an entry lies in one of the vectors")
