"""Flat vectors that hold one row and the sums of squares, and their slots.

There is one :class:`FlatRow` per device and accumulation dtype. A gate's ``.grad`` is a slice of it, so autograd adds
in place, and one operator, ``obc.ops.end_row``, ends a row.
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
        shard: (first, count) of the channels that this process sees; None if it sees all.
        read: False if these channels were not requested: their number is known, but rows have no entries for them.
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
        """The number of channels."""
        return self.stop - self.start

    @property
    def local_size(self) -> int:
        """The number of channels that this process sees."""
        return self.size if self.shard is None else self.shard[1]

    def of(self, flat_vector: Tensor) -> Tensor:
        """The slot's channels of a vector, or of a (channels, samples) matrix, laid out like the flat row."""
        return flat_vector[self.start : self.stop]

    def _local_of(self, flat_vector: Tensor) -> Tensor:
        return self.of(flat_vector) if self.shard is None else self.of(flat_vector).narrow(0, *self.shard)

    def see(self, first: int, count: int) -> None:
        """Let gates see ``count`` channels from ``first`` on."""
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
        """Whether autograd adds the gate's gradient into the flat row; True without a gate."""
        return self.gate is None or self.gate.grad is self.view

    def release(self) -> None:
        """Drop the gate and the view."""
        self.gate = self.view = None


class FlatRow:
    """One row of r and the sums S of its squares, as flat vectors over all slots of one device and dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.slots: list[Slot] = []
        self.size = 0
        self.row = torch.empty(0, device="cpu")
        self.reference = torch.empty(0, device="cpu")
        self.scores = torch.empty(0, device="cpu")
        self.samples: Tensor | None = None
        self._replaced = 0  # changes of samples that were reallocated

    @property
    def changes(self) -> int:
        """A number that grows with every change of the row in place, known without waiting for the device."""
        return self.row._version + self._replaced + (0 if self.samples is None else self.samples._version)

    def add(self, label: str, size: int) -> Slot:
        """A new slot of ``size`` channels at the end."""
        slot = Slot(label, self, self.size, self.size + size)
        self.slots.append(slot)
        self.size += size
        return slot

    def allocate(self) -> None:
        """Allocate the vectors, once every slot is known."""
        self.row = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        self.scores = torch.zeros_like(self.row)

    def sample_rows(self, samples: int) -> Tensor:
        """The (channels, samples) rows, reallocated when the number of samples changes."""
        if self.samples is None or self.samples.shape[1] != samples:
            self._replaced += 0 if self.samples is None else self.samples._version
            self.samples = torch.zeros(self.size, samples, dtype=self.dtype, device=self.device)
        return self.samples

    def zero(self) -> None:
        """Clear the row."""
        self.row.zero_()
        if self.samples is not None:
            self.samples.zero_()

    def release(self) -> None:
        """Free everything but the sums."""
        self.samples, self.reference = None, torch.empty(0, device="cpu")
        for slot in self.slots:
            slot.release()

    @property
    def values(self) -> Tensor:
        """The current row: (channels,), or (channels, samples) for sample rows."""
        return self.row if self.samples is None else self.samples

    def join_samples(self) -> None:
        """Add the row of transient weight gradients to the gates' row, if both are of one sample.

        Weight gradients have no per-sample form, so rows of several samples contain nothing from them.
        """
        if self.samples is not None and self.samples.shape[1] == 1:
            self.samples += self.row[:, None]
            self.row.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, gates included."""
        tensors = [self.row, self.reference, self.scores, self.samples, *(slot.gate for slot in self.slots)]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def first_fault(self, values: Tensor) -> str | None:
        """The label of the first slot with a value whose square is not finite; None if all squares are finite."""
        fine = values.square().isfinite().tolist()
        return next((slot.label for slot in self.slots if not all(fine[slot.start : slot.stop])), None)


@dataclass(frozen=True)
class EndedRow:
    """A row after its end.

    Attributes:
        values: per flat row (channels, samples), divided by the loss scale; a batch row has one sample.
        finite: (samples,) bool, whether all squares of a sample are finite in every flat row.
    """

    values: list[Tensor]
    finite: Tensor

    def faulty_sample(self) -> Tensor:
        """(1,) int64, the first sample that is not finite, 0 if all are; reads nothing from the device."""
        return self.finite.to(torch.uint8).argmin().reshape(1)


def end_row(flats: Sequence[FlatRow], loss_scale: float, *, add: bool = True) -> EndedRow:
    """Add the squares of the current row, or of each sample's row, if they are finite, and clear it.

    A row that spans several flat rows is left out of all of them if one part is not finite. Nothing is read from the
    device.

    Args:
        flats: all flat rows of one model.
        loss_scale: the divisor of the row.
        add: False drops the row: it is checked and cleared, but not added.
    """
    for flat in flats:
        flat.join_samples()
    values = [flat.values.reshape(flat.size, -1) / loss_scale for flat in flats]
    if all(flat.samples is None for flat in flats):
        # A single vector takes the squares at once; several wait until all of them are known to be finite.
        waits = len(flats) > 1 or not add
        sums = [torch.zeros_like(flat.scores) if waits else flat.scores for flat in flats]
        flags = [ops.end_row(total, flat.row, loss_scale)[None] for flat, total in zip(flats, sums, strict=True)]
    else:
        waits, sums = True, [part.square() for part in values]
        flags = [squares.isfinite().all(0) for squares in sums]
    finite = flags[0]
    for flag in flags[1:]:
        finite = finite & flag.to(finite.device)
    for flat, found in zip(flats, sums, strict=True):
        if waits and add:
            squares = found.reshape(flat.size, -1)
            flat.scores += torch.where(finite.to(flat.device), squares, torch.zeros_like(squares)).sum(1)
        if flat.samples is not None:  # the operator has cleared the row
            flat.zero()
    return EndedRow(values, finite)
