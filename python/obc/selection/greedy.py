"""The greedy choice of units under a budget, in tensor operations that do not wait for the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from obc.selection.effective import EffectiveWidths
from obc.selection.interactions import Columns

# The host reads what was freed once in this many steps; steps after the one that reached the budget are dropped.
STEPS_PER_LOOK = 32
# A budget counts as met if it is missed by no more than the rounding of many additions.
BUDGET_ROUNDING = 1e-12
# Increments that differ by no more than this many standard deviations of their rounding are equal.
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
        slope, curvature: (G,) and (G, G) float64: effective widths that fall by k free slope . k - k^T curvature k.
        unit_costs: (C,) float64, what each unit frees by itself; slope and curvature are then zero.
        effective: of groups whose effective width is not their width; None where there are none.
    """

    slope: Tensor
    curvature: Tensor
    unit_costs: Tensor | None
    effective: EffectiveWidths | None = None


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
        inside: group that is a whole block -> the groups whose units go with it.
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
        """What is freed when every group falls to its lowest width."""
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
    """What every group would lose next.

    Attributes:
        increments, rounding: (groups,) sums over these units, and how far they are uncertain.
        taken: (groups,) what the effective widths lose.
        freed: (groups,).
        promised: (groups,) what groups are compared by: ``freed``, but on flat parts of a curve.
        units: (places, groups); as many of them as the group would lose.
    """

    increments: Tensor
    rounding: Tensor
    taken: Tensor
    freed: Tensor
    promised: Tensor
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

    The tensors are small, so that a step takes as long as the number of its operations says: some of them work in
    place, constants are tensors made once, and numbers of units are float64, which needs no conversions.
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

        self._increments = problem.increments.clone()  # infinite where a unit is gone
        if problem.costs.unit_costs is not None:
            self._increments.masked_fill_(problem.costs.unit_costs <= 0, math.inf)  # what frees nothing stays
        self._widths = float64(problem.sizes)
        self._slope = problem.costs.slope.clone()
        self._own_curvature = problem.costs.curvature.diagonal()
        self._freed = float64([0.0])
        # Products of rows walk at random with their roundings: by eps sqrt(rows) times the product of both norms.
        step = TIE_DEVIATIONS * torch.finfo(torch.float64).eps * math.sqrt(problem.rows)
        self._squares = problem.increments.abs()
        self._rounding, self._rounding_by_norm = step * self._squares, step * self._squares.sqrt()
        if problem.interacting is not None:
            self._rounding_by_norm *= 2 * problem.interacting.strength
        self._removed_squares = float64(0.0)

    @torch.inference_mode()
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
                last = int(enough[0, 0])
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
            effective = self._problem.costs.effective
            step = self._one_each if effective is None else effective.promised(self._widths, self._one_each)
            freed = ((self._slope - self._own_curvature * step) * step).clamp_min(0).index_select(0, self._group_of)
        stays = (self._widths <= self._lowest).index_select(0, self._group_of)
        scores = quotient(self._increments, freed) if self._problem.per_cost else self._increments
        return scores.masked_fill(stays, math.inf)

    def _step(self) -> tuple[Tensor, Tensor]:
        """The units removed, (places,) and -1 for none, and what has been freed since the start, (1,)."""
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
        """(groups,) of each group the unit with the lowest quotient, of equals the first; any where none is left."""
        scores, upper = increments, increments + rounding
        unit_costs = self._problem.costs.unit_costs
        if unit_costs is not None and self._problem.per_cost:
            scores, upper = quotient(scores, unit_costs), quotient(upper, unit_costs)
        lowest = self._highest.scatter_reduce(0, self._group_of, upper, "amin")
        near = scores <= lowest.index_select(0, self._group_of)
        places = torch.where(near, self._units, self._past_units)
        return self._past_all.scatter_reduce(0, self._group_of, places, "amin")

    def _remove(self, group: Tensor, count: Tensor, taken: Tensor, units: Tensor, valid: Tensor) -> None:
        """``units`` that are ``valid`` (places,), of ``group`` (1,): ``count`` units, ``taken`` of effective width."""
        if self._interacting is not None:
            columns = self._interacting.columns(units, valid, self.ranking)
            self._increments.add_(columns, alpha=2 * self._interacting.strength)
            self._removed_squares += (self._squares.index_select(0, units) * valid).sum()
        self._increments.index_add_(0, units, torch.where(valid, self._infinity, self._zero))
        self._widths.index_add_(0, group, count, alpha=-1)
        self._slope.addcmul_(self._problem.costs.curvature.index_select(0, group)[0], taken, value=-2)
