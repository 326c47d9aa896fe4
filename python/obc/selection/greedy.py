"""The greedy choice of units under a budget, in tensor operations that do not wait for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from obc.model.curves import Curve
from obc.selection.interactions import Columns, Standing

# The host reads the freed amount once in this many steps; steps after the budget was reached are dropped.
STEPS_PER_LOOK = 32
# A budget counts as met if it is missed by no more than the rounding of many additions.
BUDGET_ROUNDING = 1e-12
# Increments that differ by no more than this many standard deviations of their rounding are equal.
TIE_DEVIATIONS = 16


@dataclass(frozen=True)
class Interacting:
    """How increments depend on earlier removals.

    Attributes:
        columns: sums of columns of the Gram matrix.
        within: products of every unit with the one picked in its group; None if units are removed one by one.
        strength: factor of the off-diagonal, 1 - shrinkage.
    """

    columns: Columns
    within: Callable[[Tensor], Tensor] | None
    strength: float


@dataclass(frozen=True)
class RemovalCosts:
    """The costs freed by removals from G groups: a polynomial of their numbers, or each unit's own cost.

    Attributes:
        slope, curvature: (G,) and (G, G) float64: if effective widths fall by k, slope . k - k^T curvature k is freed.
        unit_costs: (C,) float64, what each unit frees alone; slope and curvature are then zero.
        effective: for groups whose effective width is not their width; None if there are none.
    """

    slope: Tensor
    curvature: Tensor
    unit_costs: Tensor | None
    effective: EffectiveWidths | None = None


@dataclass(frozen=True)
class Problem:
    """C units in G groups; the units of a group are adjacent.

    Attributes:
        increments: (C,) float64, what each unit adds to the loss while nothing else is removed.
        sizes: number of units of each group.
        lowest: lowest permitted width of each group.
        multiples: a group that loses units keeps a multiple of this.
        costs: what removals free.
        per_cost: whether increments are divided by costs.
        rows: the number of rows summed for each increment, which determines its rounding error.
        interacting: None if increments do not change.
        inside: group that is a whole block -> the groups whose units are removed with it.
    """

    increments: Tensor
    sizes: Sequence[int]
    lowest: Sequence[int]
    multiples: Sequence[int]
    costs: RemovalCosts
    per_cost: bool
    rows: int
    interacting: Interacting | None
    inside: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def reachable(self) -> float:
        """The cost freed when every group has its lowest width."""
        losses = [size - lowest for size, lowest in zip(self.sizes, self.lowest, strict=True)]
        for block, groups in self.inside.items():
            if losses[block]:
                for group in groups:
                    losses[group] = self.sizes[group]
        if self.costs.unit_costs is not None:
            parts = zip(self.costs.unit_costs.split(list(self.sizes)), losses, strict=True)
            return float(sum(part.topk(loss).values.sum() for part, loss in parts))
        removed = torch.tensor(losses, dtype=torch.float64, device=self.costs.slope.device)
        if self.costs.effective is not None:
            widths = torch.tensor(self.sizes, dtype=torch.float64, device=removed.device)
            removed = self.costs.effective.taken(widths, removed)
            for block, groups in self.inside.items():
                if losses[block]:
                    removed[list(groups)] = self.costs.effective.at(widths)[list(groups)]
        return float(self.costs.slope @ removed - removed @ self.costs.curvature @ removed)


@dataclass(frozen=True)
class Proposals:
    """The units that every group would lose next.

    Attributes:
        increments, rounding: (groups,) sums over these units, and their uncertainty.
        taken: (groups,) decrease of the effective widths.
        freed: (groups,) what the removal frees.
        promised: (groups,) what groups are compared by: ``freed``, except on flat parts of a curve.
        units: (places, groups); only as many of them count as the group would lose.
    """

    increments: Tensor
    rounding: Tensor
    taken: Tensor
    freed: Tensor
    promised: Tensor
    units: Tensor


def quotient(increment: Tensor, cost: Tensor) -> Tensor:
    """The value that greedy minimises: increment / cost, or increment * cost for a negative increment.

    A removal that lowers the loss is better the more it frees; division would make it worse. Either way, removals that
    lower the loss come before those that raise it.
    """
    return torch.where(increment < 0, increment * cost, increment / cost)


class Greedy:
    """The state of a choice, on the device of the increments.

    A step considers the units that each group would lose next: one, or as many as lead to the next multiple, picked one
    after another with their interactions. The group whose units together have the lowest quotient loses them; among
    equals the first group, and in it the first unit.
    The tensors are small, so a step's time is determined by the number of operations. Some therefore work in place,
    constants are tensors made once, and unit numbers are float64, which needs no conversions.
    """

    def __init__(self, problem: Problem) -> None:
        device = problem.increments.device
        groups, units = len(problem.sizes), len(problem.increments)

        def float64(values: Sequence[float] | float) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        self._problem = problem
        self._interacting = problem.interacting
        self._zero, self._infinity = float64(0.0), float64(math.inf)
        self._no_unit, self._past_units = torch.tensor(-1, device=device), torch.tensor(units, device=device)
        self._highest, self._past_all = self._infinity.repeat(groups), self._past_units.repeat(groups)
        self._lowest, self._multiples = float64(problem.lowest), float64(problem.multiples)
        self._group_of = torch.arange(groups, device=device).repeat_interleave(
            torch.tensor(problem.sizes, device=device)
        )
        self._units = torch.arange(units, device=device)
        self._places = torch.arange(max(problem.multiples), dtype=torch.float64, device=device)
        self._one_each = torch.ones(groups, dtype=torch.float64, device=device)

        self._increments = problem.increments.clone()  # infinite for removed units
        if problem.costs.unit_costs is not None:
            self._increments.masked_fill_(problem.costs.unit_costs <= 0, math.inf)  # units that free nothing stay
        self._widths = float64(problem.sizes)
        self._slope = problem.costs.slope.clone()
        self._own_curvature = problem.costs.curvature.diagonal()
        self._freed = float64([0.0])
        # Rounding errors of products of rows walk at random: eps sqrt(rows) times the product of both norms.
        step = TIE_DEVIATIONS * torch.finfo(torch.float64).eps * math.sqrt(problem.rows)
        self._squares = problem.increments.abs()
        self._rounding, self._rounding_by_norm = step * self._squares, step * self._squares.sqrt()
        if problem.interacting is not None:
            self._rounding_by_norm *= 2 * problem.interacting.strength
        self._removed_squares = float64(0.0)

    @torch.inference_mode()
    def until(self, budget: float) -> tuple[Tensor, float]:
        """Remove units until ``budget`` is freed or none may go; returns them in order, on the host, and the total."""
        target = budget * (1 - BUDGET_ROUNDING)
        picks: list[Tensor] = []
        while True:
            steps = [self._step() for _ in range(STEPS_PER_LOOK)]
            units, freed = (torch.stack(values).cpu() for values in zip(*steps, strict=True))
            picks.append(units)  # (steps, places); -1 is an empty place; all are -1 once nothing may go
            enough = (freed >= target).nonzero()
            if len(enough):
                last = int(enough[0, 0])
                picks[-1] = units[: last + 1]
            elif bool((units[-1] >= 0).any()):
                continue
            else:
                last = -1
            order = torch.cat(picks).flatten()
            return order[order >= 0], float(freed[last])

    def standing(self) -> Standing:
        """Values that decide which unit goes next; a unit that frees nothing is treated as one that must stay."""
        freed = self._problem.costs.unit_costs
        if freed is None:
            effective = self._problem.costs.effective
            step = self._one_each if effective is None else effective.promised(self._widths, self._one_each)
            freed = ((self._slope - self._own_curvature * step) * step).index_select(0, self._group_of)
        stays = (self._widths <= self._lowest).index_select(0, self._group_of) | (freed <= 0)
        costs = freed.masked_fill(stays, 1.0) if self._problem.per_cost else torch.ones_like(self._increments)
        strength = 0.0 if self._interacting is None else 2 * self._interacting.strength
        return Standing(self._increments.masked_fill(stays, math.inf), costs, strength)

    def _step(self) -> tuple[Tensor, Tensor]:
        """The removed units, (places,) with -1 for none, and the total freed since the start, (1,)."""
        chunk = self._one_each if len(self._places) == 1 else (self._widths - 1) % self._multiples + 1
        proposals = self._propose(chunk)
        stays = (self._widths - chunk < self._lowest) | (proposals.promised <= self._zero)
        scores = torch.stack((proposals.increments, proposals.increments + proposals.rounding))
        scores.masked_fill_(stays, math.inf)
        divisors = proposals.promised.masked_fill(stays, 1.0)
        score, upper = quotient(scores, divisors) if self._problem.per_cost else scores
        best = upper.amin()
        group = (score <= best).view(torch.uint8).argmax(0, keepdim=True)
        units = proposals.units.index_select(1, group)[:, 0]

        any_goes = best < self._infinity
        count = chunk.index_select(0, group) * any_goes
        valid = self._places < count
        taken = count if proposals.taken is chunk else proposals.taken.index_select(0, group) * any_goes
        self._remove(group, count, taken, units, valid)
        self._freed = self._freed + torch.where(any_goes, proposals.freed.index_select(0, group), self._zero)
        return torch.where(valid, units, self._no_unit), self._freed

    def _propose(self, chunk: Tensor) -> Proposals:
        """The next ``chunk`` (groups,) units of every group."""
        interacting, unit_costs = self._interacting, self._problem.costs.unit_costs
        increments, rounding = self._increments, self._rounding
        if interacting is not None:
            rounding = torch.addcmul(rounding, self._rounding_by_norm, self._removed_squares.sqrt())
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
            last = [value.index_select(0, picks[-1]) for value in values]
            if place:
                past = chunk <= place
                last = [total + value.masked_fill_(past, 0.0) for total, value in zip(totals, last, strict=True)]
            totals = last
        if unit_costs is not None:
            return Proposals(totals[0], totals[1], chunk, totals[2], totals[2], torch.stack(picks))
        effective, taken = self._problem.costs.effective, chunk
        if effective is not None:
            taken = effective.taken(self._widths, chunk)
        freed = promised = (self._slope - self._own_curvature * taken) * taken
        if effective is not None:
            expected = effective.promised(self._widths, chunk)
            promised = (self._slope - self._own_curvature * expected) * expected
        return Proposals(totals[0], totals[1], taken, freed, promised, torch.stack(picks))

    def _first_of_each_group(self, increments: Tensor, rounding: Tensor) -> Tensor:
        """(groups,) the unit of each group with the lowest quotient, first among equals; any if none is left."""
        scores, upper = increments, increments + rounding
        unit_costs = self._problem.costs.unit_costs
        if unit_costs is not None and self._problem.per_cost:
            scores, upper = quotient(scores, unit_costs), quotient(upper, unit_costs)
        lowest = self._highest.scatter_reduce(0, self._group_of, upper, "amin")
        near = scores <= lowest.index_select(0, self._group_of)
        places = torch.where(near, self._units, self._past_units)
        return self._past_all.scatter_reduce(0, self._group_of, places, "amin")

    def _remove(self, group: Tensor, count: Tensor, taken: Tensor, units: Tensor, valid: Tensor) -> None:
        """Remove the ``valid`` ``units`` (places,) of ``group`` (1,): ``count`` units, ``taken`` effective width."""
        if self._interacting is not None:
            columns = self._interacting.columns(units, valid, self.standing)
            self._increments.add_(columns, alpha=2 * self._interacting.strength)
            self._removed_squares += (self._squares.index_select(0, units) * valid).sum()
        self._increments.index_add_(0, units, torch.where(valid, self._infinity, self._zero))
        self._widths.index_add_(0, group, count, alpha=-1)
        self._slope.addcmul_(self._problem.costs.curvature.index_select(0, group)[0], taken, value=-2)


class EffectiveWidths:
    """Effective widths of G groups (:class:`obc.model.costs.Costs`) at every width, and the rates at which they fall.

    Args:
        curves: index of a group -> its curve; for other groups the effective width is the width.
        sizes: number of units of each group.
        lowest: lowest permitted width of each group.
    """

    def __init__(
        self, curves: Mapping[int, Curve], sizes: Sequence[int], lowest: Sequence[int], device: torch.device
    ) -> None:
        values, rates = [], []
        for group, (size, least) in enumerate(zip(sizes, lowest, strict=True)):
            curve = curves.get(group) or Curve({0: 0.0, size: float(size)})
            values.append(curve.dense(size))
            rates.append(curve.rates(size, least))
        first = torch.tensor([0, *(size + 1 for size in sizes[:-1])], device="cpu").cumsum(0)
        self._first = first.to(device)
        self._values, self._rates = (torch.cat(parts).to(device) for parts in (values, rates))

    def at(self, widths: Tensor) -> Tensor:
        """(G,) effective widths at ``widths`` (G,), which count from 0."""
        return self._values.index_select(0, self._first + widths.long())

    def taken(self, widths: Tensor, units: Tensor) -> Tensor:
        """(G,) decrease of the effective widths when every group loses so many units; too many count as all."""
        return self.at(widths) - self.at((widths - units).clamp_min(0))

    def promised(self, widths: Tensor, units: Tensor) -> Tensor:
        """(G,) decrease for so many units at the best rate on the way to any smaller width.

        On a flat part of a curve a unit frees nothing; this credits it with its share of the next fall.
        """
        return self._rates.index_select(0, self._first + widths.long()) * units
