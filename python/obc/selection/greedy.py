"""The greedy choice of units under a budget, in tensor operations that do not wait for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obc.selection.interactions import Columns

# So many steps between two looks at what was freed; steps after the one that reached the budget are dropped.
STEPS_PER_LOOK = 32
# A budget is met by what misses it by no more than the rounding of many additions.
BUDGET_ROUNDING = 1e-12
# Increments no further apart than so many standard deviations of their rounding are equal.
TIE_DEVIATIONS = 16


@dataclass(frozen=True)
class Interacting:
    """How increments depend on what was removed before.

    Attributes:
        columns: sums of columns of the Gram matrix.
        within: products of every unit with the one picked in its group; None where units go one by one.
        strength: factor of the off-diagonal, 1 - shrinkage.
    """

    columns: Columns
    within: Callable[[Tensor], Tensor] | None
    strength: float


@dataclass(frozen=True)
class RemovalCosts:
    """What removals from G groups free: a polynomial of their numbers, or each unit's own cost.

    Attributes:
        slope, curvature: (G,) and (G, G) float64: k units of every group free slope . k - k^T curvature k.
        unit_costs: (C,) float64, what each unit frees by itself; slope and curvature are then zero.
    """

    slope: Tensor
    curvature: Tensor
    unit_costs: Tensor | None


@dataclass(frozen=True)
class Problem:
    """C units of G groups, those of a group side by side.

    Attributes:
        increments: (C,) float64, what each unit adds to the loss while nothing else is removed.
        sizes: units of each group.
        lowest: widths that the groups can fall to.
        multiples: a group that loses units keeps a multiple of this.
        costs: what removals free.
        per_cost: increments are compared per cost.
        rows: how many rows were summed for each increment, which says how far it is rounded.
        interacting: None where increments do not change.
    """

    increments: Tensor
    sizes: Sequence[int]
    lowest: Sequence[int]
    multiples: Sequence[int]
    costs: RemovalCosts
    per_cost: bool
    rows: int
    interacting: Interacting | None

    def reachable(self) -> float:
        """What is freed when every group falls to its lowest width."""
        losses = [size - lowest for size, lowest in zip(self.sizes, self.lowest, strict=True)]
        if self.costs.unit_costs is not None:
            parts = zip(self.costs.unit_costs.split(list(self.sizes)), losses, strict=True)
            return float(sum(part.topk(loss).values.sum() for part, loss in parts))
        removed = torch.tensor(losses, dtype=torch.float64, device=self.costs.slope.device)
        return float(self.costs.slope @ removed - removed @ self.costs.curvature @ removed)


@dataclass(frozen=True)
class Proposals:
    """What every group would lose next.

    Attributes:
        increments, rounding: (groups,) sums over these units, and how far they are uncertain.
        freed: (groups,).
        units: (places, groups); as many of them as the group would lose.
    """

    increments: Tensor
    rounding: Tensor
    freed: Tensor
    units: Tensor


def quotient(increment: Tensor, cost: Tensor) -> Tensor:
    """increment / cost, what greedy minimises; where the increment is negative, increment * cost.

    A removal that lowers the loss is the better the more it frees; division would make it the worse. Either way what
    lowers the loss goes before what raises it.
    """
    return torch.where(increment < 0, increment * cost, increment / cost)


class Greedy:
    """The state of a choice, on the device of the increments.

    A step looks, in each group, at the units that the group would lose next: one, or as many as lead to the next
    multiple, picked one after another with their interactions. The group whose units together have the lowest
    quotient loses them. Of equals the first group, and in it the first unit, goes.
    """

    def __init__(self, problem: Problem) -> None:
        device = problem.increments.device
        self._problem = problem
        self._interacting = problem.interacting
        sizes = torch.tensor(problem.sizes, device=device)
        self._lowest = torch.tensor(problem.lowest, device=device)
        self._multiples = torch.tensor(problem.multiples, device=device)
        self._group_of = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
        self._units = torch.arange(len(problem.increments), device=device)
        self._places = torch.arange(max(problem.multiples), device=device)

        self._gone = torch.full((max(problem.multiples),), math.inf, dtype=torch.float64, device=device)
        self._increments = problem.increments.clone()  # infinite where a unit is gone
        if problem.costs.unit_costs is not None:
            self._increments.masked_fill_(problem.costs.unit_costs <= 0, math.inf)  # what frees nothing stays
        self._widths = sizes
        self._slope = problem.costs.slope.clone()
        self._own_curvature = problem.costs.curvature.diagonal()
        self._freed = torch.zeros((), dtype=torch.float64, device=device)
        # Products of rows walk at random with their roundings: by eps sqrt(rows) times the product of both norms.
        step = TIE_DEVIATIONS * torch.finfo(torch.float64).eps * math.sqrt(problem.rows)
        self._squares = problem.increments.abs()
        self._rounding, self._rounding_by_norm = step * self._squares, step * self._squares.sqrt()
        self._removed_squares = torch.zeros((), dtype=torch.float64, device=device)

    def until(self, budget: float) -> tuple[Tensor, float]:
        """Removes until ``budget`` is freed, or nothing more may go. The units in order, on the host, and the freed."""
        target = budget * (1 - BUDGET_ROUNDING)
        picks: list[Tensor] = []
        while True:
            steps = [self._step() for _ in range(STEPS_PER_LOOK)]
            units, freed = (torch.stack(values).cpu() for values in zip(*steps, strict=True))
            picks.append(units)  # (steps, places), -1 where a place is empty, and all over once nothing may go
            enough = (freed >= target).nonzero()
            if len(enough):
                last = int(enough[0])
                picks[-1] = units[: last + 1]
            elif bool((units[-1] >= 0).any()):
                continue
            else:
                last = -1
            order = torch.cat(picks).flatten()
            return order[order >= 0], float(freed[last])

    def ranking(self) -> Tensor:
        """(C,) quotients of single units as they are now, infinite where nothing may go."""
        freed = self._problem.costs.unit_costs
        if freed is None:
            freed = (self._slope - self._own_curvature).clamp_min(0).index_select(0, self._group_of)
        stays = (self._widths <= self._lowest).index_select(0, self._group_of)
        scores = quotient(self._increments, freed) if self._problem.per_cost else self._increments
        return scores.masked_fill(stays, math.inf)

    def _step(self) -> tuple[Tensor, Tensor]:
        """The units removed, (places,) and -1 for none, and what has been freed since the start."""
        chunk = (self._widths - 1) % self._multiples + 1
        proposals = self._propose(chunk)
        stays = (self._widths - chunk < self._lowest) | (proposals.freed <= 0)
        score = proposals.increments.masked_fill(stays, math.inf)
        upper = score + proposals.rounding
        if self._problem.per_cost:
            freed = proposals.freed.masked_fill(stays, 1.0)
            score, upper = quotient(score, freed), quotient(upper, freed)
        best = upper.amin()
        group = (score <= best).to(torch.uint8).argmax(0, keepdim=True)
        units = proposals.units.index_select(1, group).flatten()

        any_goes = best < math.inf
        count = chunk.index_select(0, group) * any_goes
        valid = self._places < count
        self._remove(group, count, units, valid)
        self._freed = self._freed + torch.where(any_goes, proposals.freed.index_select(0, group)[0], 0.0)
        return units.masked_fill(~valid, -1), self._freed

    def _propose(self, chunk: Tensor) -> Proposals:
        """The next ``chunk`` (groups,) units of every group."""
        interacting, unit_costs = self._interacting, self._problem.costs.unit_costs
        increments, rounding = self._increments, self._rounding
        if interacting is not None:
            others = (2 * interacting.strength) * self._removed_squares.sqrt()
            rounding = torch.addcmul(rounding, self._rounding_by_norm, others)
        picks: list[Tensor] = []
        totals: list[Tensor] = []
        for place in range(len(self._places)):
            if place:
                if interacting is not None and interacting.within is not None:
                    added = interacting.within(picks[-1])
                    increments = increments.add(added, alpha=2 * interacting.strength)
                increments = increments.index_fill(0, picks[-1], math.inf)
            picks.append(self._first_of_each_group(increments, rounding))
            values = [increments, rounding] if unit_costs is None else [increments, rounding, unit_costs]
            of_picks = torch.stack([value.index_select(0, picks[-1]) for value in values])
            totals.append(of_picks.masked_fill(place >= chunk, 0.0) if place else of_picks)
        total = totals[0] if len(totals) == 1 else torch.stack(totals).sum(0)
        freed = (self._slope - self._own_curvature * chunk) * chunk if unit_costs is None else total[2]
        return Proposals(total[0], total[1], freed, torch.stack(picks))

    def _first_of_each_group(self, increments: Tensor, rounding: Tensor) -> Tensor:
        """(groups,) of each group the unit with the lowest quotient, of equals the first; any where none is left."""
        scores, upper = increments, increments + rounding
        unit_costs = self._problem.costs.unit_costs
        if unit_costs is not None and self._problem.per_cost:
            scores, upper = quotient(scores, unit_costs), quotient(upper, unit_costs)
        near = scores <= self._per_group(upper, math.inf).index_select(0, self._group_of)
        places = self._units.masked_fill(~near, len(near))
        return self._per_group(places, len(near))

    def _per_group(self, values: Tensor, highest: float) -> Tensor:
        """(groups,) minima."""
        empty = torch.full_like(self._widths, highest, dtype=values.dtype)
        return empty.scatter_reduce_(0, self._group_of, values, "amin")

    def _remove(self, group: Tensor, count: Tensor, units: Tensor, valid: Tensor) -> None:
        """``units`` that are ``valid`` (places,), ``count`` (1,) in number, of ``group`` (1,)."""
        if self._interacting is not None:
            columns = self._interacting.columns(units, valid, self.ranking)
            self._increments.add_(columns, alpha=2 * self._interacting.strength)
            self._removed_squares = self._removed_squares + (self._squares.index_select(0, units) * valid).sum()
        self._increments.index_add_(0, units, self._gone.masked_fill(~valid, 0.0))
        self._widths = self._widths.index_add(0, group, count, alpha=-1)
        self._slope = self._slope.sub(count * self._problem.costs.curvature.index_select(0, group)[0], alpha=2)
