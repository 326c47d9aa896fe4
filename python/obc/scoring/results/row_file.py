"""Rows of numbers in a file, appended in blocks and read through a memory map."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from obc.files import atomic_write

# The file begins with this and the row width, so that no other file is mistaken for one or overwritten.
_MAGIC = b"obc.rows/1 "
_HEADER_BYTES = 64


def _header(width: int) -> bytes:
    return (_MAGIC + str(width).encode()).ljust(_HEADER_BYTES)


class RowFile:
    """A (rows, width) float32 matrix in a file, in the machine's byte order, after a header of 64 bytes.

    Bytes after the last row are ignored: a process killed while writing may leave some.

    Attributes:
        rows: the number of rows.
    """

    def __init__(self, path: Path, width: int, rows: int) -> None:
        self.path, self.width, self.rows = path, width, rows

    @staticmethod
    def refuse_other(path: Path) -> None:
        """Raise if no file of rows can be created at this path.

        Raises:
            FileExistsError: the path holds another kind of file.
            FileNotFoundError: the folder does not exist.
        """
        if not path.parent.is_dir():
            raise FileNotFoundError(f"no file of rows can be created at {path}: there is no folder {path.parent}")
        if not path.exists():
            return
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) == _MAGIC:
                return
        raise FileExistsError(f"{path} is not a file of rows, so it is not overwritten; pass another path")

    @classmethod
    def create(cls, path: Path, width: int) -> RowFile:
        """Create a new file. It replaces an earlier file of rows at this path; memory maps of that stay valid."""
        cls.refuse_other(path)
        with atomic_write(path) as file:
            file.write(_header(width))
        return cls(path, width, 0)

    @classmethod
    def open(cls, path: Path, width: int, rows: int) -> RowFile:
        """Open an existing file, of which the first ``rows`` rows count.

        Raises:
            ValueError: the file is missing, has another width, or has fewer rows.
        """
        if not path.exists():
            raise ValueError(f"the file of rows {path} is missing; delete the checkpoint to start again")
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
        if header != _header(width):
            raise ValueError(f"{path} is not a file of rows of {width} channels")
        there = (path.stat().st_size - _HEADER_BYTES) // (4 * width)
        if there < rows:
            raise ValueError(f"{path} holds {there} rows, but {rows} were written; it is damaged")
        return cls(path, width, rows)

    def reserve(self, num_rows: int) -> None:
        """Does nothing: a file grows as rows are written."""

    def append(self, parts: Sequence[Tensor]) -> None:
        """Append rows; ``parts`` are their columns, side by side."""
        block = torch.cat([part.detach().cpu() for part in parts], dim=1).to(torch.float32).contiguous()
        with self.path.open("r+b") as file:
            file.seek(_HEADER_BYTES + 4 * self.width * self.rows)
            file.write(block.numpy().data)
        self.rows += len(block)

    def sync(self) -> None:
        """Return once every row is on disk."""
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())

    def matrix(self) -> Tensor:
        """(rows, width), memory-mapped; changes to it don't reach the file."""
        if self.rows == 0:
            return torch.empty(0, self.width, device="cpu")
        shape = (self.rows, self.width)
        return torch.from_numpy(np.memmap(self.path, dtype=np.float32, mode="c", offset=_HEADER_BYTES, shape=shape))
