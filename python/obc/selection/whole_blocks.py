"""The greedy choice with groups that are whole blocks: with a block go the units of the groups inside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from obc.selection.greedy import Greedy, Problem, Proposals


class BlockGreedy(Greedy):
    """:class:`obc.selection.greedy.Greedy` with groups of one unit that are whole blocks.

    Let r_b be the row of a block b and S the units removed so far. Removing the block changes the loss of every row by

        r_b - sum of the rows of its own units, and branches, in S

    because those units were removed already. Its increment, and what it adds to the increments of others, use this
    difference. It frees its own cost and the cost of the units left inside, which then can't be removed any more.

    Args:
        problem: with ``inside``.
        rows: (C, N) float64 rows of all units if they interact; None if increments do not change.
    """

    def __init__(self, problem: Problem, rows: Tensor | None) -> None:
        super().__init__(problem)
        self._rows = rows
        sizes = torch.tensor(problem.sizes, device="cpu")
        first = sizes.cumsum(0) - sizes
        device = problem.increments.device
        self._place_of = {block: place for place, block in enumerate(problem.inside)}
        self._blocks = torch.tensor(list(problem.inside), dtype=torch.int64, device=device)
        self._block_units = first.to(device)[self._blocks]
        self._holds = problem.increments.new_zeros(len(self._blocks), len(problem.sizes))  # itself and inside
        self._around: dict[int, list[int]] = {}  # group -> the blocks that contain it, whose rows lose what it takes
        for block, groups in problem.inside.items():
            self._holds[self._place_of[block], [block, *groups]] = 1.0
            for group in groups:
                self._around.setdefault(group, []).append(self._place_of[block])
        self._curvature = problem.costs.curvature
        self._vanished = torch.zeros(len(problem.sizes), dtype=torch.bool, device=device)
        if rows is not None:
            self._gone = rows.new_zeros(rows.shape[1])  # sum of the rows of all removed units
            self._left = rows[self._block_units]  # (blocks, N)
            self._strength = 0.0 if problem.interacting is None else problem.interacting.strength

    def _propose(self, chunk: Tensor) -> Proposals:
        if self._rows is not None:
            changes = self._left.square().sum(1) + 2 * self._strength * (self._left @ self._gone)
            there = self._widths[self._blocks] > 0
            self._increments[self._block_units] = torch.where(there, changes, self._increments[self._block_units])
        proposals = super()._propose(chunk)
        gone = self._holds * self._effective_left()
        freed = gone @ self._slope - ((gone @ self._curvature) * gone).sum(1)
        proposals.freed[self._blocks] = proposals.promised[self._blocks] = freed
        return proposals

    def _effective_left(self) -> Tensor:
        """(groups,) the effective widths; 0 for groups removed with a block."""
        effective = self._problem.costs.effective
        left = self._widths if effective is None else effective.at(self._widths)
        return left.masked_fill(self._vanished, 0.0)

    def _remove(self, group: Tensor, count: Tensor, taken: Tensor, units: Tensor, valid: Tensor) -> None:
        block = int(group)
        picked = units[valid]
        if not len(picked):
            return
        if block not in self._place_of:
            super()._remove(group, count, taken, units, valid)
            if self._rows is not None:
                self._note_gone(block, self._rows[picked].sum(0))
            return
        place = self._place_of[block]
        holds = self._holds[place]
        gone = holds * self._effective_left()
        inside = holds > 0
        self._widths.masked_fill_(inside, 0.0)
        self._vanished |= inside
        self._slope -= 2 * self._curvature @ gone
        if self._rows is not None:
            row = self._left[place].clone()
            self._increments += 2 * self._strength * (self._rows @ row)
            self._removed_squares += row @ row
            self._note_gone(block, row)
        self._increments.masked_fill_(inside.index_select(0, self._group_of), math.inf)

    def _note_gone(self, group: int, row: Tensor) -> None:
        self._gone += row
        if enclosing := self._around.get(group):
            self._left[enclosing] -= row


def inside_of(names: Sequence[str], inside: Mapping[str, Sequence[str]]) -> dict[int, list[int]]:
    """Index of a block -> indices of the groups inside it, among the groups ``names``."""
    place = {name: index for index, name in enumerate(names)}
    return {
        place[block]: [place[name] for name in groups if name in place]
        for block, groups in inside.items()
        if block in place
    }
