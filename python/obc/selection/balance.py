"""Equal widths within families of groups, and how much each family loses: decided by the rows."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obc.selection.choice import removal_order
from obc.selection.interactions import estimated_shrinkage
from obc.selection.task import Task
from obc.selection.uniform import EqualWidths, equal_shares, equal_widths

# Widths of a family that are compared at first; then those around the best of them, ever closer.
_COMPARED = 32
_SWEEPS = 8


def select_balanced(task: Task) -> dict[str, Tensor]:
    """Choose units that free the budget: equal widths within every family, and among these what changes the loss least.

    :func:`obc.select` ranks the units of each group. Let S be the units removed if every group of family f loses the
    first k_f in its ranking, and r_u the rows of unit u. The change of the loss is taken to be

        "joint"         (1 - s) sum_n (sum_{u in S} r_u[n])^2 + s sum_{u in S} sum_n r_u[n]^2,     s the shrinkage
        "independent"   sum_{u in S} sum_n r_u[n]^2

    The search starts at equal shares of all families. For each pair of families in turn it finds the k that change the
    loss least among those that just free the budget with the other families as they are, until no pair gains.

    Returns:
        Group -> the indices of the units to remove: int64, ascending, on the CPU.

    Raises:
        BudgetError: the budget can't be met.
        ValueError: groups of a family have different widths.
    """
    costs, selection, shrinkage = task.costs, task.selection, task.shrinkage
    limits = equal_widths(task, task.families)
    removed = {name: torch.empty(0, dtype=torch.int64, device="cpu") for name in task.scores}
    equal_shares(limits, costs, task.budget)  # raises before units are ranked
    if not limits:
        return removed
    rankings = [_Ranking.of(limit, task) for limit in limits]
    if selection == "joint" and shrinkage is None:
        units = torch.cat([ranking.units for ranking in rankings])
        shrinkage = estimated_shrinkage(units) if units.shape[1] < len(units) else 0.0
    together = 1 - (shrinkage or 0.0) if selection == "joint" else 0.0

    def change(lost: Sequence[int]) -> float:
        counted = list(zip(rankings, lost, strict=True))
        alone = sum(float(ranking.squares[count]) for ranking, count in counted)
        if together == 0:
            return alone
        rows = torch.stack([ranking.changes[count] for ranking, count in counted]).sum(0)
        return (1 - together) * alone + together * float(rows.square().sum())

    def freed(lost: Sequence[int]) -> float:
        return costs.freed({name: count for limit, count in zip(limits, lost, strict=True) for name in limit.family})

    def chosen(limits: Sequence[EqualWidths], budget: float) -> list[int]:
        start = equal_shares(limits, costs, budget)
        lost = [limit.permitted[-1] - start[limit.family[0]] for limit in limits]
        steps = [[limit.permitted[-1] - width for width in reversed(limit.permitted)] for limit in limits]
        return _least_change(lost, steps, lambda trial: freed(trial) >= budget, change)

    if task.goal is not None and task.goal > task.budget:
        final = chosen(limits, task.goal)
        within = [limit.at_least(limit.permitted[-1] - count) for limit, count in zip(limits, final, strict=True)]
        lost = chosen(within, task.budget)
    else:
        lost = chosen(limits, task.budget)
    for ranking, count in zip(rankings, lost, strict=True):
        removed |= {name: order[:count].sort().values for name, order in ranking.order.items()}
    return removed


@dataclass(frozen=True)
class _Ranking:
    """What a family loses first. A removal takes one unit of each of its groups.

    Attributes:
        order: group -> its units, those that go first in front.
        units: (removals, N) float64 rows of every removal: sums over its units; of scores (removals, 0).
        changes: (removals + 1, N) float64, sums of the first k rows.
        squares: (removals + 1,) float64, sums over the units of the first k removals of their squares, or scores.
    """

    order: Mapping[str, Tensor]
    units: Tensor
    changes: Tensor
    squares: Tensor

    @classmethod
    def of(cls, limit: EqualWidths, task: Task) -> _Ranking:
        most = limit.permitted[-1] - limit.permitted[0]
        order: dict[str, Tensor] = {}
        rows, joint = task.scores, task.selection == "joint"
        units = torch.zeros(most, len(rows[limit.family[0]]) if joint else 0, dtype=torch.float64, device="cpu")
        squares = torch.zeros(most + 1, dtype=torch.float64, device="cpu")
        for name in limit.family:
            order[name] = removal_order(rows[name], most, selection=task.selection, shrinkage=task.shrinkage)
            values = rows[name].detach().double().cpu()[..., order[name]]
            squares[1:] += values if values.dim() == 1 else values.square().sum(0)
            if joint:
                units += values.T
        changes = torch.cat([units.new_zeros(1, units.shape[1]), units.cumsum(0)])
        return cls(order, units, changes, squares.cumsum(0))


def _least_change(
    lost: list[int],
    steps: Sequence[Sequence[int]],
    enough: Callable[[Sequence[int]], bool],
    change: Callable[[Sequence[int]], float],
) -> list[int]:
    """The permitted removals of every family that change the loss least, found from ``lost``."""

    def at(first: int, count: int, second: int) -> list[int] | None:
        """``first`` loses ``count``, and ``second`` as little as is enough; None if it never is."""
        trial = list(best)
        trial[first] = count

        def suffices(amount: int) -> bool:
            trial[second] = amount
            return enough(trial)

        place = bisect_left(steps[second], True, key=suffices)
        if place == len(steps[second]):
            return None
        trial[second] = steps[second][place]
        return trial

    best, least = list(lost), change(lost)
    pairs = list(itertools.combinations(range(len(steps)), 2))
    for _ in range(_SWEEPS):
        before = least
        for pair in pairs:
            # The family with fewer widths says how much it loses; the other one frees what is missing.
            first, second = sorted(pair, key=lambda family: len(steps[family]))
            low, high = 0, len(steps[first])
            while True:
                stride = -(-(high - low) // _COMPARED)
                trials = [(place, at(first, steps[first][place], second)) for place in range(low, high, stride)]
                compared = [(change(trial), place, trial) for place, trial in trials if trial is not None]
                if not compared:
                    break
                value, place, trial = min(compared, key=lambda found: found[:2])
                if value < least:
                    best, least = trial, value
                if stride == 1:
                    break
                low, high = max(low, place - stride + 1), min(high, place + stride)
        if least >= before:
            break
    return best
