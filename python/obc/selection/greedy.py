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

        self._increments = problem.increments.clone()  # infinite where a unit is gone
        if problem.costs.unit_costs is not None:
            self._increments.masked_fill_(problem.costs.unit_costs <= 0, math.inf)  # what frees nothing stays
        self._widths = sizes
        self._slope = problem.costs.slope.clone()
        self._freed = torch.zeros((), dtype=torch.float64, device=device)
        # Products of rows walk at random with their roundings: by eps sqrt(rows) times the product of both norms.
        self._norms = problem.increments.abs().sqrt()
        self._rounding = self._norms * (TIE_DEVIATIONS * torch.finfo(torch.float64).eps * math.sqrt(problem.rows))
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
            freed = (self._slope - self._problem.costs.curvature.diagonal()).index_select(0, self._group_of)
        may_go = (self._widths > self._lowest).index_select(0, self._group_of) & (freed > 0)
        scores = quotient(self._increments, freed) if self._problem.per_cost else self._increments
        return torch.where(may_go, scores, math.inf)

    def _step(self) -> tuple[Tensor, Tensor]:
        """The units removed, (places,) and -1 for none, and what has been freed since the start."""
        chunk = (self._widths - 1) % self._multiples + 1
        proposals = self._propose(chunk)
        may_go = (self._widths - chunk >= self._lowest) & (proposals.freed > 0)
        score, upper = proposals.increments, proposals.increments + proposals.rounding
        if self._problem.per_cost:
            score, upper = quotient(score, proposals.freed), quotient(upper, proposals.freed)
        may_go = may_go & (score < math.inf)
        score, upper = torch.where(may_go, score, math.inf), torch.where(may_go, upper, math.inf)
        group = (score <= upper.amin()).to(torch.uint8).argmax(0, keepdim=True)

        count = torch.where(may_go, chunk, 0).index_select(0, group)
        valid = self._places < count
        units = proposals.units.index_select(1, group).flatten()
        self._remove(group, count, units, valid)
        self._freed = self._freed + torch.where(may_go, proposals.freed, 0.0).index_select(0, group)[0]
        return torch.where(valid, units, -1), self._freed

    def _propose(self, chunk: Tensor) -> Proposals:
        """The next ``chunk`` (groups,) units of every group."""
        problem = self._problem
        rounding = self._rounding
        if self._interacting is not None:
            others = 2 * self._interacting.strength * self._removed_squares.sqrt()
            rounding = rounding * (self._norms + others)
        else:
            rounding = rounding * self._norms
        increments = self._increments
        total, total_rounding, freed = torch.zeros_like(self._slope).repeat(3, 1)
        units: list[Tensor] = []
        for place in range(len(self._places)):
            scores, upper = increments, increments + rounding
            if problem.costs.unit_costs is not None and problem.per_cost:
                scores, upper = quotient(scores, problem.costs.unit_costs), quotient(upper, problem.costs.unit_costs)
            lowest = self._per_group(upper, math.inf)
            near = scores <= lowest.index_select(0, self._group_of)
            picked = self._per_group(torch.where(near, self._units, len(near)), len(near))
            units.append(picked)
            wanted = place < chunk
            total = torch.where(wanted, total + increments.index_select(0, picked), total)
            total_rounding = torch.where(wanted, total_rounding + rounding.index_select(0, picked), total_rounding)
            if problem.costs.unit_costs is not None:
                freed = torch.where(wanted, freed + problem.costs.unit_costs.index_select(0, picked), freed)
            if place + 1 < len(self._places):
                if self._interacting is not None and self._interacting.within is not None:
                    added = self._interacting.within(picked)
                    increments = increments.add(added, alpha=2 * self._interacting.strength)
                increments = increments.index_fill(0, picked, math.inf)
        if problem.costs.unit_costs is None:
            freed = self._slope * chunk - problem.costs.curvature.diagonal() * chunk.square()
        return Proposals(total, total_rounding, freed, torch.stack(units))

    def _per_group(self, values: Tensor, highest: float) -> Tensor:
        """(groups,) minima."""
        empty = torch.full_like(self._widths, highest, dtype=values.dtype)
        return empty.scatter_reduce_(0, self._group_of, values, "amin")

    def _remove(self, group: Tensor, count: Tensor, units: Tensor, valid: Tensor) -> None:
        """``units`` that are ``valid`` (places,), ``count`` (1,) in number, of ``group`` (1,)."""
        if self._interacting is not None:
            columns = self._interacting.columns(units, valid, self.ranking)
            self._increments.add_(columns, alpha=2 * self._interacting.strength)
            self._removed_squares = self._removed_squares + (self._norms.index_select(0, units) * valid).square().sum()
        self._increments.index_add_(0, units, torch.where(valid, math.inf, 0.0).double())
        self._widths = self._widths.index_add(0, group, -count)
        self._slope = self._slope - 2 * count * self._problem.costs.curvature.index_select(0, group)[0]
