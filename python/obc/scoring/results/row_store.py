"""Stores every row that counts: on the row's device, in host memory, or in a file.

A row is written at a position that is counted on the device. The position advances only if the row was finite, so
nothing is read back, and a row left out is overwritten by the next. Full blocks are spilled to the host or the file,
with one device read per block.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from obc.scoring.errors import ScoringError
from obc.scoring.reading.flat_row import EndedRow, FlatRow, Slot
from obc.scoring.results.kept_rows import Columns, KeptRows
from obc.scoring.results.row_file import RowFile

logger = logging.getLogger("obc")

# "device", "host", or the path of a file.
RowsTo = str | PathLike[str]

# Size of a block on the device, which is spilled when full: large enough that its one device read costs nothing.
_SPILLED_BYTES = 32 << 20

# Initial capacity in rows, unless ``reserve`` tells how many will come.
_FIRST_ROWS = 16


class RowStore:
    """The kept rows of a scorer.

    Args:
        flats: the vectors that hold the current row.
        to: "device": beside them. "host": in host memory, pinned if CUDA is available. A path: in a file, which is
            memory-mapped when read.
    """

    def __init__(self, flats: Sequence[FlatRow], to: RowsTo) -> None:
        self.flats = list(flats)
        self.width = sum(flat.size for flat in flats)
        self.to = to
        self._blocks = [_Block(flat) for flat in flats]
        self._capacity = 0
        self._bound = 0  # an upper bound of the rows in the blocks, until they are counted again
        self._spills: _HostRows | RowFile | None = None
        self.file_path = None if to in ("device", "host") else Path(to)
        if self.file_path is not None:
            RowFile.refuse_other(self.file_path)

    def bytes(self, num_rows: int) -> int:
        """Bytes of ``num_rows`` rows: four for each channel."""
        return 4 * self.width * num_rows

    @property
    def memory_bytes(self) -> int:
        """Bytes of device and host memory that the store takes now, including free capacity."""
        spilled = self._spills.matrix_bytes if isinstance(self._spills, _HostRows) else 0
        return spilled + sum(block.rows.nbytes for block in self._blocks)

    def reserve(self, num_rows: int) -> None:
        """Make room for exactly ``num_rows`` more rows, and log the bytes."""
        where = self.flats[0].device if self.to == "device" else self.to
        logger.info("keeping %d rows: %d bytes on %s", num_rows, self.bytes(num_rows), where)
        if (spill := self._spill()) is not None:
            spill.reserve(num_rows)
            if self._capacity == 0:
                self._resize(min(num_rows, self._spilled_rows()))
        elif self._bound + num_rows > self._capacity:
            self._resize(self._bound + num_rows)

    def make_room(self, samples: int) -> None:
        """Enlarge the store if ``samples`` more rows do not fit."""
        if self._bound + samples > self._capacity:
            self._enlarge(samples)

    def append(self, ended: EndedRow) -> None:
        """Keep the finite samples of a row; call :meth:`make_room` first."""
        for block, values in zip(self._blocks, ended.values, strict=True):
            block.append(values, ended.finite)
        self._bound += ended.finite.numel()

    def matrices(self, start: int = 0) -> list[Tensor]:
        """Per flat vector, the (rows, channels) from row ``start`` on. Reads from the device."""
        if (spill := self._spilled()) is not None:
            return list(spill.matrix()[start:].split([flat.size for flat in self.flats], dim=1))
        kept = self._count()
        return [block.rows[start:kept] for block in self._blocks]

    def kept(self, slots: Mapping[str, Mapping[str, Slot]]) -> KeptRows:
        """The rows so far; later rows don't change them.

        Args:
            slots: module name -> side -> its slot.
        """
        if (spill := self._spilled()) is not None:
            matrices = [spill.matrix()]
            starts = itertools.accumulate((flat.size for flat in self.flats), initial=0)
            places = {flat: (0, start) for flat, start in zip(self.flats, starts, strict=False)}
        else:
            matrices = self.matrices()
            places = {flat: (index, 0) for index, flat in enumerate(self.flats)}

        def columns(slot: Slot) -> Columns:
            matrix, start = places[slot.flat]
            return matrix, start + slot.start, start + slot.stop

        named = {name: {side: columns(slot) for side, slot in sides.items()} for name, sides in slots.items()}
        return KeptRows(matrices, named)

    def load(self, rows: Sequence[Tensor] | RowFile) -> None:
        """Replace the stored rows by these: matrices as from :meth:`matrices`, or a file to append to."""
        for block in self._blocks:
            block.count.zero_()
        self._bound = 0
        if isinstance(rows, RowFile):
            self._spills = rows
            return
        num_rows = len(rows[0])
        if self.to != "device":
            self._spills = None
            spill = self._spill()
            assert spill is not None
            spill.append(rows)
            return
        # Rows that were returned earlier may be views of the block, so it is not overwritten.
        self._capacity = 0
        self._resize(num_rows)
        for block, matrix in zip(self._blocks, rows, strict=True):
            block.rows[:num_rows].copy_(matrix)
            block.count.fill_(num_rows)
        self._bound = num_rows

    def written_file(self) -> RowFile | None:
        """The file with every row written to it, or None if rows don't go to a file. Reads from the device."""
        spill = self._spilled()
        return spill if isinstance(spill, RowFile) else None

    def _spill(self) -> _HostRows | RowFile | None:
        """The store of rows that don't fit on the device, made when first needed; None if all stay there."""
        if self._spills is None and self.to != "device":
            if self.file_path is None:
                self._spills = _HostRows(self.width, any(flat.device.type == "cuda" for flat in self.flats))
            else:
                self._spills = RowFile.create(self.file_path, self.width)
        return self._spills

    def _spilled(self) -> _HostRows | RowFile | None:
        """The same, with every row written to it. Reads from the device."""
        spill = self._spill()
        if spill is not None and (kept := self._count()):
            spill.append([block.rows[:kept] for block in self._blocks])
            for block in self._blocks:
                block.count.zero_()
        if spill is not None:
            self._bound = 0
        return spill

    def _spilled_rows(self) -> int:
        return max(1, _SPILLED_BYTES // max(1, 4 * self.width))

    def _enlarge(self, samples: int) -> None:
        if any(flat.device.type == "cuda" for flat in self.flats) and torch.cuda.is_current_stream_capturing():
            raise ScoringError(
                f"no room for another row while a CUDA graph is captured ({self._capacity} rows): call "
                "scorer.reserve_rows(n) with the number of replays before capturing"
            )
        if self._spilled() is not None:
            if samples > self._capacity:
                self._resize(max(samples, self._spilled_rows() if self._capacity == 0 else 0))
            return
        self._bound = self._count()
        if self._bound + samples > self._capacity:
            self._resize(max(self._bound + samples, 2 * self._capacity, _FIRST_ROWS))

    def _count(self) -> int:
        count = int(self._blocks[0].count)
        if count > self._capacity:
            raise ScoringError(
                f"{count} rows were replayed, but {self._capacity} fit; call scorer.reserve_rows({count}) "
                "before capturing the CUDA graph"
            )
        return count

    def _resize(self, capacity: int) -> None:
        kept = self._count()
        for block in self._blocks:
            block.resize(capacity, kept)
        self._capacity = capacity


class _Block:
    """Rows of one flat vector on its device, and how many of them count.

    It has one place more than its capacity: when the block is full, rows that don't count are written there.
    """

    def __init__(self, flat: FlatRow) -> None:
        self.flat = flat
        self.rows = torch.empty(1, flat.size, device=flat.device)
        self.count = torch.zeros((), dtype=torch.int64, device=flat.device)

    def append(self, values: Tensor, finite: Tensor) -> None:
        last = len(self.rows) - 1
        finite = finite.to(self.count.device)
        places = torch.where(finite, self.count + finite.cumsum(0) - 1, last).clamp_(max=last)
        self.rows.index_copy_(0, places, values.t().to(self.rows.dtype))
        self.count += finite.sum()

    def resize(self, capacity: int, kept: int) -> None:
        rows = torch.empty(capacity + 1, self.flat.size, device=self.flat.device)
        rows[:kept].copy_(self.rows[:kept])
        self.rows = rows


class _HostRows:
    """Rows in host memory, which grows by doubling."""

    def __init__(self, width: int, pinned: bool) -> None:
        self.rows, self.pinned = 0, pinned
        self._matrix = torch.empty(0, width, pin_memory=pinned, device="cpu")

    @property
    def matrix_bytes(self) -> int:
        return self._matrix.nbytes

    def reserve(self, num_rows: int) -> None:
        if self.rows + num_rows > len(self._matrix):
            matrix = torch.empty(self.rows + num_rows, self._matrix.shape[1], pin_memory=self.pinned, device="cpu")
            matrix[: self.rows].copy_(self._matrix[: self.rows])
            self._matrix = matrix

    def append(self, parts: Sequence[Tensor]) -> None:
        more = len(parts[0])
        if self.rows + more > len(self._matrix):
            self.reserve(max(more, len(self._matrix)))
        start = 0
        for part in parts:
            self._matrix[self.rows : self.rows + more, start : start + part.shape[1]].copy_(part)
            start += part.shape[1]
        self.rows += more

    def matrix(self) -> Tensor:
        return self._matrix[: self.rows]
