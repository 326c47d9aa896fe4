"""Interactions of removals: columns of the rows' Gram matrix, which is held whole, in parts, or not at all.

With x_u the N rows of unit u, removing the units S changes what every other unit u adds to the loss by 2 sum_{h in S}
x_u . x_h, a sum of columns of X X^T with X (C, N). Everything is float64: products of two float32 numbers are exact in
it, so the result stays right after cancellation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

Form = Literal["full", "blocked", "rows"]
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True)
class Standing:
    """The present values that decide which units are removed next.

    Attributes:
        increments: (C,) what each unit adds to the loss, infinite if it was removed or must stay.
        costs: (C,) what increments are divided by, or multiplied by where they are negative.
        strength: a unit's increment changes by this many times its product with a removed unit.
    """

    increments: Tensor
    costs: Tensor
    strength: float

    def scores(self) -> Tensor:
        """(C,) the unit with the smallest score is removed next."""
        return torch.where(self.increments < 0, self.increments * self.costs, self.increments / self.costs)


StandingNow = Callable[[], Standing]

FLOAT64_BYTES, FLOAT32_BYTES = 8, 4
# This many rows of X times X^T run close to matrix-product speed; of a larger block more columns are foreseen wrongly.
BLOCK = 64
# The next units are foreseen among this share of all, those with the lowest scores, and no fewer than LEAST_FRONT. With
# a smaller share fewer units of a block are removed before the next block is needed.
FRONT_SHARE, LEAST_FRONT = 1 / 12, 1024
# Foreseeing takes longer than it saves where columns of fewer units are computed: there those with the lowest scores
# are taken.
FORESEEN_UNITS = 1 << 15
# A column in such a product takes about an eighth of the time of a single one (measured: 2.1 and 20 ms, 512 x 100,000):
# a block pays off if at least this many of its columns are used.
WORTH = BLOCK // 8
# This many columns are computed singly before another block is tried, so that trying costs little.
PATIENCE = 4 * BLOCK
# On a CPU, with more channels than this, the whole matrix takes longer than those of its columns that are used.
FEW_CHANNELS = 32 * BLOCK
# With so few rows, reading X takes no longer than the rest of a removal, so a cache of columns saves nothing.
FEW_ROWS = 16


class Columns(Protocol):
    """Columns of X X^T, computed or held; X (C, N) are the units' rows."""

    def __call__(self, picks: Tensor, valid: Tensor, standing: StandingNow) -> Tensor:
        """(C,) the sum of those columns ``picks`` (k,) of X X^T that are ``valid`` (k,)."""

    def column(self, unit: int, standing: StandingNow) -> Tensor:
        """(C,) one column; it may be overwritten by the next call."""


def choose_form(units: Tensor, sizes: Sequence[int], *, chunks: bool, max_bytes: int) -> Form:
    """The fastest form that holds at most ``max_bytes`` in addition to X (C, N).

    Args:
        sizes: number of units of each group.
        chunks: several units are removed at a time; one pass over X then serves them all, and a cache would not help.
    """
    channels, rows = units.shape
    on_host = units.device.type == "cpu"
    blocks = sum(size * size for size in sizes) if chunks else 0
    if (channels * channels + blocks) * FLOAT64_BYTES <= max_bytes and not (on_host and channels > FEW_CHANNELS):
        return "full"
    fits = BLOCK * channels * FLOAT64_BYTES <= max_bytes
    # The host manages the cache: an accelerator would wait for it in every step, and reads X fast enough.
    return "blocked" if on_host and fits and rows > FEW_ROWS and not chunks else "rows"


def columns_of(form: Form, units: Tensor, max_bytes: int) -> Columns:
    """The source of the columns of X X^T; ``units`` is X (C, N), float64."""
    if form == "full":
        return FullGram(units)
    return BlockedGram(units, max_bytes) if form == "blocked" else RowsOnly(units)


class FullGram:
    """X X^T at once: 2 C^2 N operations and 8 C^2 bytes; then 8 C bytes are read per removed unit."""

    def __init__(self, units: Tensor) -> None:
        self._gram = units @ units.T

    def __call__(self, picks: Tensor, valid: Tensor, standing: StandingNow) -> Tensor:
        rows = self._gram.index_select(0, picks)
        return rows[0] if len(picks) == 1 else valid.double() @ rows

    def column(self, unit: int, standing: StandingNow) -> Tensor:
        """(C,) a column of the matrix that is held."""
        return self._gram[unit]


class RowsOnly:
    """X (sum of the picked rows of X): 2 C N operations and 8 C N bytes read per step; no matrix is held."""

    def __init__(self, units: Tensor) -> None:
        self._units = units

    def __call__(self, picks: Tensor, valid: Tensor, standing: StandingNow) -> Tensor:
        return self._units @ (valid.double() @ self._units.index_select(0, picks))

    def column(self, unit: int, standing: StandingNow) -> Tensor:
        """(C,) one column, computed now."""
        return self._units @ self._units[unit]


class BlockedGram:
    """Columns in blocks, of the units that are removed next; at most ``max_bytes`` of them are held.

    One matrix product computes a block, with 2 C N operations a column. The units of a block are those that a greedy
    choice at fixed costs removes next, among the few units with the lowest scores. A column is used at most once; if
    its unit is not removed, it was computed in vain. If too many are, columns are computed one at a time, as in
    :class:`RowsOnly`.
    """

    def __init__(self, units: Tensor, max_bytes: int) -> None:
        self.units = units
        # Rounds among the units that go next need no columns, but a copy of the rows in single precision.
        self.copy_fits = units.numel() * FLOAT32_BYTES <= max_bytes
        slots = max(1, min(max_bytes // (FLOAT64_BYTES * len(units)), len(units)))
        self._unit_in = torch.full((slots,), -1, device=units.device)
        self._slot_of: dict[int, int] = {}
        self._found, self._alone = WORTH, 0  # since the last block

    @functools.cached_property
    def _cache(self) -> Tensor:
        """(slots, C) the columns that are held; no memory is taken before the first one is."""
        return self.units.new_empty(len(self._unit_in), len(self.units))

    def __call__(self, picks: Tensor, valid: Tensor, standing: StandingNow) -> Tensor:
        total = torch.zeros(len(self.units), dtype=torch.float64, device=self.units.device)
        for unit in picks[valid].tolist():
            total += self.column(unit, standing)
        return total

    def column(self, unit: int, standing: StandingNow) -> Tensor:
        """(C,) one column: held, computed with a block of those that go next, or computed alone."""
        if unit in self._slot_of:
            self._found += 1
        elif self._found >= WORTH or self._alone >= PATIENCE:
            self._fill(unit, standing())
            self._found = self._alone = 0
        else:
            self._alone += 1
            return self.units @ self.units[unit]
        slot = self._slot_of.pop(unit)
        self._unit_in[slot] = -1
        return self._cache[slot]

    def _fill(self, wanted: int, standing: Standing) -> None:
        """Columns of ``wanted`` and of those that go next, in place of those that rank last."""
        held = self._unit_in >= 0
        scores = standing.scores()
        priority = torch.where(held, scores[self._unit_in], torch.inf)
        slots = priority.topk(min(BLOCK, len(priority))).indices  # the free ones, then those that rank last
        for unit in self._unit_in[slots].tolist():
            self._slot_of.pop(unit, None)
        self._unit_in[slots] = -1
        next_ones = self._foreseen if len(scores) >= FORESEEN_UNITS else self._lowest
        units = torch.tensor([wanted, *next_ones(wanted, standing, scores, len(slots) - 1)], device="cpu")
        slots = slots[: len(units)]
        self._cache[slots] = self.units[units] @ self.units.T
        self._unit_in[slots] = units
        self._slot_of.update(zip(units.tolist(), slots.tolist(), strict=True))

    def _lowest(self, removed: int, standing: Standing, scores: Tensor, count: int) -> list[int]:
        """Up to ``count`` units without a column, those with the lowest scores."""
        scores[self._unit_in[self._unit_in >= 0]] = torch.inf
        units = scores.topk(count, largest=False, sorted=False).indices
        return units[scores[units] < torch.inf].tolist()

    def _foreseen(self, removed: int, standing: Standing, scores: Tensor, count: int) -> list[int]:
        """Up to ``count`` units without a column that go next once ``removed`` has gone, if nothing outside the front
        does."""
        width = min(max(LEAST_FRONT, int(FRONT_SHARE * len(scores))), len(scores))
        front = scores.topk(width, largest=False, sorted=False).indices
        front = front[scores[front] < torch.inf]
        rows = self.units[front].float()  # precise enough to foresee by
        increments, costs = standing.increments[front].float(), standing.costs[front].float().numpy()
        increments.add_(rows @ self.units[removed].float(), alpha=standing.strength)
        values, quotients = increments.numpy(), np.empty_like(costs)
        units: list[int] = front.tolist()
        found: list[int] = []
        while len(found) < count:
            with np.errstate(all="ignore"):
                np.divide(values, costs, out=quotients)
                np.multiply(values, costs, out=quotients, where=values < 0)
            place = int(quotients.argmin())
            if not quotients[place] < np.inf:  # none is left, or float32 is too narrow
                break
            if units[place] not in self._slot_of:
                found.append(units[place])
            increments.add_(rows @ rows[place], alpha=standing.strength)
            values[place] = np.inf
        return found


def products_within(units: Tensor, sizes: Sequence[int], max_bytes: int) -> Callable[[Tensor], Tensor]:
    """A function that gives, for one unit picked per group (groups,), each unit's product with its group's pick: (C,).

    Uses the diagonal blocks of X X^T if they fit ``max_bytes``, otherwise X.
    """
    ends = list(accumulate(sizes))
    parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    if sum(size * size for size in sizes) * FLOAT64_BYTES > max_bytes:

        def from_rows(picks: Tensor) -> Tensor:
            picked = units.index_select(0, picks)
            return torch.cat([units[part] @ row for part, row in zip(parts, picked, strict=True)])

        return from_rows

    blocks = torch.cat([(units[part] @ units[part].T).flatten() for part in parts])
    widths = torch.tensor(sizes, device=units.device)
    starts = torch.tensor([part.start for part in parts], device=units.device)
    offsets = torch.tensor(list(accumulate([size * size for size in sizes], initial=0))[:-1], device=units.device)
    group = torch.arange(len(sizes), device=units.device).repeat_interleave(widths)
    column = torch.arange(len(units), device=units.device) - starts[group]

    def from_blocks(picks: Tensor) -> Tensor:
        first = offsets + (picks - starts) * widths
        return blocks.index_select(0, first.index_select(0, group) + column)

    return from_blocks


def estimated_shrinkage(units: Tensor) -> float:
    """The noise share of the off-diagonal of the Gram matrix of ``units`` (C, N): 0 is none, 1 is all.

    It minimises the expected squared distance of (1 - s) * off-diagonal to the truth, estimated from the rows
    themselves (Ledoit and Wolf; Schäfer and Strimmer's target "diagonal, unequal variance", about zero instead of the
    mean): with w_uvn = x_un x_vn,

        s = sum_{u != v} Var(sum_n w_uvn) / sum_{u != v} (sum_n w_uvn)^2,   clamped to [0, 1].

    Neither sum needs the C x C matrix: 2 C N^2 operations. A single row has no variance; the result is then 1.
    """
    rows = units.shape[1]
    if rows < 2:
        return 1.0
    squares = units.square()
    off_products = squares.sum(0).square().sum() - squares.square().sum()  # sum over u != v and n of w_uvn^2
    off_gram = (units.T @ units).square().sum() - squares.sum(1).square().sum()  # sum over u != v of (X X^T)_uv^2
    variance = (off_products - off_gram / rows) * rows / (rows - 1)
    return float(torch.where(off_gram > 0, variance / off_gram, 1.0).clamp(0.0, 1.0))
