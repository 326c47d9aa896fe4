"""Symmetric matrices as block rows on and above their diagonal, concatenated in a vector."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from obc.model.autocast import without_autocast
from obc.model.settings import float32_products

# Every block row is a separate product, so narrower blocks would make many small ones.
_NARROWEST = 128
# Further halving of blocks saves less than a thirtieth of the multiplications.
_MOST_BLOCKS = 16


@dataclass(frozen=True)
class Triangle:
    """How a symmetric (width, width) matrix is packed.

    Block row i holds the rows from i * block on, contiguously, from the first column of its diagonal block to the last
    column. With k block rows this is (k + 1) / 2k of the matrix.
    """

    width: int

    @property
    def block(self) -> int:
        """Width of one block of columns."""
        return max(_NARROWEST, -(-self.width // _MOST_BLOCKS))

    @property
    def numbers(self) -> int:
        """How many numbers are kept."""
        return sum(rows * (self.width - start) for start, rows in self._rows())

    def add_product(self, packed: Tensor, left: Tensor, right: Tensor, beta: int) -> None:
        """packed = left^T right + beta * packed.

        Args:
            packed: (numbers,).
            left: (positions, width), with any strides.
            right: the same, with left^T right symmetric.
            beta: 0 or 1.
        """
        if not computes_half(packed.device):
            self._add(packed, left.mT @ right, beta)
            return
        for start, stored in self._blocks(packed):
            torch.addmm(stored, left[:, start : start + len(stored)].mT, right[:, start:], beta=beta, out=stored)

    def diagonal(self, packed: Tensor) -> Tensor:
        """(width,) the diagonal of a packed matrix."""
        return torch.cat([stored.diagonal() for _, stored in self._blocks(packed)])

    def unpacked(self, packed: Tensor) -> Tensor:
        """(width, width) the matrix, exactly symmetric."""
        whole = packed.new_empty(self.width, self.width)
        for start, stored in self._blocks(packed):
            end = start + len(stored)
            whole[start:end, start:] = stored
            whole[end:, start:end] = stored[:, len(stored) :].mT
            square = stored[:, : len(stored)]
            whole[start:end, start:end] = square.triu() + square.triu(1).mT
        return whole

    def _add(self, packed: Tensor, whole: Tensor, beta: int) -> None:
        for start, stored in self._blocks(packed):
            part = whole[start : start + len(stored), start:]
            if beta:
                stored += part
            else:
                stored.copy_(part)

    def _rows(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.width, self.block):
            yield start, min(self.block, self.width - start)

    def _blocks(self, packed: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The first row of each block row, and the block row (rows, width - first row) as a view."""
        begin = 0
        for start, rows in self._rows():
            count = rows * (self.width - start)
            yield start, packed[begin : begin + count].view(rows, self.width - start)
            begin += count


def computes_half(device: torch.device) -> bool:
    """Whether the block rows are separate products; on a GPU there is one whole product."""
    return device.type == "cpu"


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32: TF32 and autocast keep too few bits for a matrix that is to be inverted."""
    with float32_products.changed(), without_autocast():
        yield
