"""The greedy choice where some groups are whole blocks: with a block go the units of the groups inside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from obc.selection.greedy import Greedy, Problem, Proposals


class BlockGreedy(Greedy):
    """:class:`obc.selection.greedy.Greedy` with groups of one unit that are whole blocks.

    With r_b the row of a block b, and S what is gone already, removing the block changes the loss of every row by

        r_b - sum of the rows of its own units, and branches, in S

    because those are gone already; its increment, and what it adds to the increments of others, are of this
    difference. It frees what it costs and what the units left inside it cost; these can't go any more.

    Args:
        problem: with ``inside``.
        rows: (C, N) float64 of all units, where they interact; None where increments do not change.
    """

    def __init__(self, problem: Problem, rows: Tensor | None) -> None:
        super().__init__(problem)
        self._rows = rows
        sizes = torch.tensor(problem.sizes)
        first = sizes.cumsum(0) - sizes
        device = problem.increments.device
        self._inside = {
            block: torch.tensor(groups, dtype=torch.int64, device=device) for block, groups in problem.inside.items()
        }
        self._block_of = {block: int(first[block]) for block in problem.inside}  # its unit
        self._around: dict[int, list[int]] = {}  # group -> the blocks around it, whose rows lose what it takes
        self._units_of: dict[int, list[int]] = {
            group: list(range(int(first[group]), int(first[group]) + size)) for group, size in enumerate(problem.sizes)
        }
        for block, groups in problem.inside.items():
            for group in groups:
                self._around.setdefault(group, []).append(block)
        self._curvature = problem.costs.curvature
        self._vanished = torch.zeros(len(problem.sizes), dtype=torch.bool, device=device)
        if rows is not None:
            self._gone = rows.new_zeros(rows.shape[1])  # sum of the rows of all that is gone
            self._left = {block: rows[unit].clone() for block, unit in self._block_of.items()}
            self._strength = 0.0 if problem.interacting is None else problem.interacting.strength

    def _propose(self, chunk: Tensor) -> Proposals:
        for block, unit in self._block_of.items():
            if self._rows is not None and self._widths[block] > 0:
                row = self._left[block]
                self._increments[unit] = row @ row + 2 * self._strength * (self._gone @ row)
        proposals = super()._propose(chunk)
        left = self._effective_left()
        for block in self._inside:
            gone = self._vanishing(block, left)
            freed = self._slope @ gone - gone @ self._curvature @ gone
            proposals.freed[block] = proposals.promised[block] = freed
        return proposals

    def _effective_left(self) -> Tensor:
        """(groups,) the effective widths, 0 of groups that went with a block."""
        effective = self._problem.costs.effective
        left = self._widths if effective is None else effective.at(self._widths)
        return left.masked_fill(self._vanished, 0.0)

    def _vanishing(self, block: int, left: Tensor) -> Tensor:
        """(groups,) what of ``left`` goes with a block."""
        gone = torch.zeros_like(left)
        places = [block, *self._inside[block].tolist()]
        gone[places] = left[places]
        return gone

    def _remove(self, group: Tensor, count: Tensor, taken: Tensor, units: Tensor, valid: Tensor) -> None:
        block = int(group)
        picked = units[valid]
        if not len(picked):
            return
        if block not in self._inside:
            super()._remove(group, count, taken, units, valid)
            if self._rows is not None:
                self._note_gone(block, self._rows[picked].sum(0))
            return
        gone = self._vanishing(block, self._effective_left())
        places = [block, *self._inside[block].tolist()]
        self._widths[places] = 0.0
        self._vanished[places] = True
        self._slope -= 2 * self._curvature @ gone
        if self._rows is not None:
            row = self._left[block]
            self._increments += 2 * self._strength * (self._rows @ row)
            self._removed_squares += row @ row
            self._note_gone(block, row.clone())
        for inner in places:
            self._increments[self._units_of[inner]] = math.inf

    def _note_gone(self, group: int, row: Tensor) -> None:
        self._gone += row
        for block in self._around.get(group, ()):
            self._left[block] = self._left[block] - row


def inside_of(names: Sequence[str], inside: Mapping[str, Sequence[str]]) -> dict[int, list[int]]:
    """Index of a block -> indices of the groups inside it, of the groups ``names``."""
    place = {name: index for index, name in enumerate(names)}
    return {
        place[block]: [place[name] for name in groups if name in place]
        for block, groups in inside.items()
        if block in place
    }
