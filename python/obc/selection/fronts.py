"""The greedy choice among many units: steps among the few that may go next, checked afterwards against all others.

Let D_t be the sum of the rows that a round removes before its step t. A unit's increment is then

    increment_t = increment_0 + strength * (row . D_t)

A round takes the units with the lowest scores, its front, and removes units of the front alone. Each step reads only
the front's rows. One matrix product of all rows with all D_t then shows which other units may have been within reach
of being removed at some step. The increments of these few are computed in float64. The round keeps the steps before
the first one at which another unit was within reach: in these, the choice among all units is the same.

The product has half or single precision, and its rows have length 1. By the Cauchy-Schwarz inequality its error is at
most a small constant times the length of D_t. Most units are much further from being removed.

A large front is treated in the same way: its steps are taken in rounds, each with a smaller front.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import obc._native as _native
from obc.selection.greedy import Problem

# (units of its front, steps) of a round, and of a round within it, to begin with.
ROUNDS = ((8192, 96), (1024, 16))
# The fewest and most steps of a later round.
LEAST_STEPS, MOST_STEPS = 12, 256
# A front of a larger share of the units would not save enough.
FRONT_SHARE = 1 / 4
# After a round of which no step was kept, this many steps are taken among all units.
PATIENCE = 256
# Products of this many rows stay in the second-level cache.
ROWS_AT_ONCE = 4096
# Both factors and the product of bfloat16, which has 8 significant bits, are rounded by at most 2^-8 of their value:
# (1 + 2^-8)^3 - 1 < 3.1 * 2^-8. Each addition of float32 is rounded by 2^-24, on a scale that the sum may exceed by as
# much. What is below 2^-126 may become zero: in each term, whose factors are at most 1, both factors and the product.
FACTOR_ERROR, ADDITION_ERROR, UNDERFLOW = 3.1 * 2.0**-8, 2.0**-23, 2.0**-123
# In place of smaller norms and scales: the square and the reciprocal of this are normal numbers.
LEAST = 1e-140


@dataclass
class State:
    """What a removal changes, but for increments.

    Attributes:
        widths, slope: (G,) float64 of the groups.
        removed_squares, freed: (1,) float64.
    """

    widths: Tensor
    slope: Tensor
    removed_squares: Tensor
    freed: Tensor

    def tensors(self) -> list[Tensor]:
        """The tensors, in a fixed order."""
        return [self.widths, self.slope, self.removed_squares, self.freed]

    def set(self, values: Sequence[Tensor]) -> None:
        """Set all tensors to ``values``, in the order of :meth:`tensors`."""
        for tensor, value in zip(self.tensors(), values, strict=True):
            tensor.copy_(value)

    def copies(self) -> list[Tensor]:
        """Copies of all tensors, for :meth:`set`."""
        return [tensor.clone() for tensor in self.tensors()]


@dataclass
class Pace:
    """The size of rounds, which depends on how many steps of earlier ones were kept."""

    front: int
    steps: int

    def learn(self, tried: int, kept: int) -> None:
        """Make the next round longer if all steps of this one were kept, shorter if under half of them were."""
        if kept == tried == self.steps:
            self.steps = min(self.steps * 3 // 2, MOST_STEPS)
        elif 2 * kept < tried:
            self.steps = max(self.steps // 2, LEAST_STEPS)


@dataclass
class Trace:
    """Removals, one after another.

    Attributes:
        picks: the removed units.
        reach: by step, (G,) as ``csrc/cpu/greedy.h`` defines it.
        states: the state after each step.
    """

    picks: list[int] = field(default_factory=list)
    reach: list[NDArray[np.float64]] = field(default_factory=list)
    states: list[list[Tensor]] = field(default_factory=list)

    def extend(self, picks: Sequence[int], other: Trace, count: int) -> None:
        """Append the first ``count`` steps of another trace, in which the units have other numbers."""
        self.picks += picks[:count]
        self.reach += other.reach[:count]
        self.states += other.states[:count]


@dataclass
class Units:
    """What is known of each of n units in G groups; units of a group are adjacent.

    Attributes:
        rows: (n, N) float64; directions: the same divided by their norms, in the dtype of products.
        inverse: (n,) 1 / (strength * norm).
        group_of: (n,) int64.
        increments, squares, rounding, rounding_by_norm: (n,) of :class:`obc.selection.greedy.Greedy`.
        costs: (n,) what each unit frees, if units have costs of their own.
    """

    rows: Tensor
    directions: Tensor
    inverse: Tensor
    group_of: Tensor
    increments: Tensor
    squares: Tensor
    rounding: Tensor
    rounding_by_norm: Tensor
    costs: Tensor | None

    def at(self, places: Tensor) -> Units:
        """Copies of some of the units."""
        parts = (None if value is None else value.index_select(0, places) for value in vars(self).values())
        return Units(*parts)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def fast_dtype() -> torch.dtype:
    """The dtype of the faster product on this processor, by trial; no choice depends on it."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(2048, 512, dtype=dtype), torch.ones(512, 64, dtype=dtype)
        trials = []
        for _ in range(4):
            start = time.perf_counter()
            left @ right
            trials.append(time.perf_counter() - start)
        seconds[dtype] = min(trials)
    return min(seconds, key=lambda dtype: seconds[dtype])


def product_slack(norms: Tensor, rows: int) -> Tensor:
    """The most by which a product of a direction and a sum in :func:`fast_dtype` differs from the exact one.

    Args:
        norms: (steps,) float64 of the sums, whose entries are at most 1.
        rows: number of terms of a product.
    """
    return norms * (FACTOR_ERROR + ADDITION_ERROR * rows) + UNDERFLOW * rows


class Field:
    """Removal among a set of units, in rounds; shares the state with the sets that it is a part of."""

    def __init__(self, problem: Problem, units: Units, state: State, lowest: Tensor, rounds: Sequence[Pace]) -> None:
        self._problem, self._units, self._state, self._lowest = problem, units, state, lowest
        self._rounds = [pace for pace in rounds if pace.front <= FRONT_SHARE * len(units.rows)]
        assert problem.interacting is not None
        self._strength = 2 * problem.interacting.strength
        self._alone = 0  # steps to take among all units before the next round
        sizes = torch.bincount(units.group_of, minlength=len(problem.sizes))
        constants = [lowest, problem.costs.curvature, units.squares, units.rounding, units.rounding_by_norm]
        self._steps = _native.GreedySteps(
            sizes.numpy(),
            [value.contiguous().numpy() for value in constants],
            None if units.costs is None else units.costs.numpy(),
            [units.increments.numpy(), *(tensor.numpy() for tensor in state.tensors())],
            problem.per_cost,
            self._strength,
        )

    def remove(self, count: int, target: float) -> Trace:
        """Up to ``count`` removals, until ``target`` is freed or nothing may go."""
        trace = Trace()
        while len(trace.picks) < count and float(self._state.freed) < target:
            before = len(trace.picks)
            if self._rounds and self._alone == 0:
                self._round(trace, count - before, target)
            if len(trace.picks) == before and not self._step(trace):
                break
        return trace

    def _step(self, trace: Trace) -> bool:
        """One removal among all units; whether there was any."""
        reach = np.empty(len(self._problem.sizes))
        unit = self._steps.step(None, reach)
        if unit < 0:
            return False
        self._alone = max(self._alone - 1, 0)
        if self._units.squares[unit] > 0:
            self._units.increments.add_(self._units.rows @ self._units.rows[unit], alpha=self._strength)
        trace.extend([unit], Trace([unit], [reach], [self._state.copies()]), 1)
        return True

    def _round(self, trace: Trace, count: int, target: float) -> None:
        """Removals among a front, as far as they are those among all units."""
        pace = self._rounds[0]
        scores = self._scores()
        front = scores.topk(pace.front, largest=False, sorted=False).indices
        front = front[scores[front] < torch.inf].sort().values
        start = self._state.copies()
        part = Field(self._problem, self._units.at(front), self._state, self._lowest, self._rounds[1:])
        found = part.remove(min(pace.steps, count), target)
        picks: list[int] = front[found.picks].tolist()
        removed = torch.zeros(len(picks) + 1, self._units.rows.shape[1], dtype=torch.float64)
        torch.cumsum(self._units.rows[picks], 0, out=removed[1:])
        kept = self._before_rivals(front, removed[:-1], found.reach) if picks else 0
        pace.learn(len(picks), kept)
        self._state.set([start, *found.states][kept])
        if kept == 0:
            self._alone = PATIENCE
            return
        self._units.increments.add_(self._units.rows @ removed[kept], alpha=self._strength)
        self._units.increments[picks[:kept]] = torch.inf
        trace.extend(picks, found, kept)

    def _scores(self) -> Tensor:
        """(n,) the unit with the smallest goes next; infinite for those that stay."""
        state, units = self._state, self._units
        stays = state.widths <= self._lowest
        if units.costs is not None:
            costs = units.costs
        else:
            freed = state.slope - self._problem.costs.curvature.diagonal()
            stays = stays | (freed <= 0)
            costs = freed.masked_fill(stays, 1.0)[units.group_of]
        scores = units.increments.masked_fill(stays[units.group_of], torch.inf)
        if not self._problem.per_cost:
            return scores
        return torch.where(scores < 0, scores * costs, scores / costs)

    def _before_rivals(self, front: Tensor, removed: Tensor, reach: Sequence[NDArray[np.float64]]) -> int:
        """The number of first steps in which no unit outside the front could have been removed.

        Args:
            removed: (steps, N) sums of the rows removed before each step.
            reach: by step, (G,).
        """
        units = self._units
        limits = np.ascontiguousarray(np.stack(reach, 1))
        rivals = self._near(front, removed, limits)
        if not len(rivals):
            return len(removed)
        increments = torch.addmm(units.increments[rivals, None], units.rows[rivals], removed.T, alpha=self._strength)
        limits = limits[units.group_of[rivals].numpy()]
        if units.costs is not None and self._problem.per_cost:
            costs = units.costs[rivals].numpy()[:, None]
            with np.errstate(all="ignore"):  # a cost may be zero
                limits = np.where(limits < 0, limits / costs, limits * costs)
        reached = np.flatnonzero(~(increments.numpy() > limits).all(0))
        return int(reached[0]) if len(reached) else len(removed)

    def _near(self, front: Tensor, removed: Tensor, limits: NDArray[np.float64]) -> Tensor:
        """The units outside the front that low precision can't tell from units within reach."""
        units = self._units
        scale = max(float(removed.abs().amax()), LEAST)
        scaled = removed / scale
        sums = scaled.T.to(units.directions.dtype)
        slack = product_slack(scaled.norm(dim=1), len(sums)).numpy()
        inverse = (units.inverse / scale).numpy()
        groups, increments = units.group_of.numpy(), units.increments.numpy()
        costs = units.costs.numpy() if units.costs is not None and self._problem.per_cost else None
        near = np.empty(len(inverse), dtype=np.uint8)
        for first in range(0, len(near), ROWS_AT_ONCE):
            part = slice(first, first + ROWS_AT_ONCE)
            products = (units.directions[part] @ sums).float().numpy()
            part_costs = None if costs is None else costs[part]
            _native.find_rivals(
                groups[part], products, increments[part], inverse[part], part_costs, limits, slack, near[part]
            )
        near[front.numpy()] = 0
        return torch.from_numpy(near).nonzero()[:, 0]
