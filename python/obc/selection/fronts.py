"""The greedy choice among many units: steps among the few that may go next, checked afterwards against all others.

Let D_t be the sum of the rows that a round removes before its step t. A unit's increment is then

    increment_t = increment_0 + strength * (row . D_t)

A round takes the units with the lowest scores, its front, and removes units of the front alone. Each step reads only
the front's rows. One matrix product of all rows with all D_t then shows which other units may have been within reach
of being removed at some step. The increments of these few are computed in float64. The round keeps the steps before
the first one at which another unit was within reach: in these, the choice among all units is the same.

The product has half or single precision, and its rows have length 1. By the Cauchy-Schwarz inequality its error is at
most a small constant times the length of D_t. Most units are much further from being removed.

Increments of all units are not computed again after every round. The product says roughly how they have changed, which
suffices to choose the next front; for units of a front and those that may have been within reach, the change is
computed in float64. D_t therefore goes on growing from round to round, and with it the error of the product. Once it
can't tell many units from those within reach, the increments of all are computed again and D_t begins at zero.

A large front is treated in the same way: its steps are taken in rounds, each with a smaller front. Steps among the
smallest front are compiled.
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

# (units in the front, steps) of the first round, and of the first round inside it.
ROUNDS, SMALL_ROUNDS = ((8192, 96), (1024, 16)), ((3000, 64), (512, 16))
# Rounds cost more than they save with fewer than LARGE units. From SMALL units on they save if rows are many, and
# products of bfloat16 faster than those of float32.
LARGE, SMALL, MANY_ROWS = 1 << 15, 12_000, 256
# The fewest and most steps of a later round.
LEAST_STEPS, MOST_STEPS = 4, 256
# What a round costs besides its steps, counted in steps; and how much an older round weighs beside the next one.
ROUND_COST, FORGETTING = 12, 0.9
# A front with a larger share of the units would not save enough.
FRONT_SHARE = 1 / 4
# If low precision leaves open for more than this share of the units whether they are rivals, all increments are
# computed again.
UNCLEAR_SHARE = 1 / 256
# After a round that kept no step, this many steps are taken among all units.
PATIENCE = 256
# Products of this many rows stay in the second-level cache.
ROWS_AT_ONCE = 4096
# Both factors and the product of bfloat16, which has 8 significant bits, are rounded by at most 2^-8 of their value:
# (1 + 2^-8)^3 - 1 < 3.1 * 2^-8. Each addition of float32 is rounded by 2^-24, on a scale that the sum may exceed by as
# much. What is below 2^-126 may become zero: in each term, whose factors are at most 1, both factors and the product.
FACTOR_ERROR, ADDITION_ERROR, UNDERFLOW = 3.1 * 2.0**-8, 2.0**-23, 2.0**-123
# Replaces smaller norms and scales: its square and its reciprocal are still normal numbers.
LEAST = 1e-140


class FrontState:
    """The quantities other than the increments that a removal changes.

    Attributes:
        values: (2 G + 2,) float64; the others are views of it.
        widths, slope: (G,) of the groups.
        removed_squares, freed: (1,).
    """

    def __init__(self, widths: Tensor, slope: Tensor, removed_squares: Tensor, freed: Tensor) -> None:
        parts = [widths, slope, removed_squares.reshape(1), freed.reshape(1)]
        self.values = torch.cat(parts)
        self.widths, self.slope, self.removed_squares, self.freed = self.values.split([len(part) for part in parts])

    def arrays(self) -> list[NDArray[np.float64]]:
        """The views as arrays that compiled steps change in place."""
        return [part.numpy() for part in (self.widths, self.slope, self.removed_squares, self.freed)]


@dataclass
class Pace:
    """The size of rounds, which depends on how many steps of earlier ones were kept.

    Besides its steps a round costs as much as R = ROUND_COST steps. If K steps are kept on average until a rival
    appears, rounds of sqrt(2 R K) steps cost least per kept step.
    """

    front: int
    steps: int
    _kept: float = 0.0
    _rivals: float = 0.0

    def learn(self, tried: int, kept: int) -> None:
        """Choose the number of steps of the next round: this one kept ``kept`` of ``tried`` steps."""
        self._kept = FORGETTING * self._kept + kept
        self._rivals = FORGETTING * self._rivals + (kept < tried)
        between = self._kept / max(self._rivals, 1 / MOST_STEPS)
        self.steps = min(max(int((2 * ROUND_COST * between) ** 0.5), LEAST_STEPS), MOST_STEPS)


@dataclass
class Trace:
    """Removals, one after another.

    Attributes:
        picks: the removed units.
        reach: by step, (G,) as ``csrc/cpu/greedy.h`` defines it.
        states: the values of the state after each step.
    """

    picks: list[int] = field(default_factory=list)
    reach: list[NDArray[np.float64]] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)

    def extend(self, picks: Sequence[int], other: Trace, count: int) -> None:
        """Append the first ``count`` steps of another trace; ``picks`` are its units, as numbered here."""
        self.picks += picks[:count]
        self.reach += other.reach[:count]
        self.states += other.states[:count]


@dataclass
class FrontUnits:
    """The data of n units in G groups; units of a group are adjacent.

    Attributes:
        rows: (any number, N) float64; unit u has row ``places[u]``, or row u without ``places``.
        places: (n,) int64.
        directions: (n, N) the units' rows divided by their norms, in the dtype of products; None if no rounds run among
            these units.
        inverse: (n,) 1 / (strength * norm).
        group_of: (n,) int64.
        increments, squares, rounding, rounding_by_norm: (n,) of :class:`obc.selection.greedy.Greedy`.
        costs: (n,) what each unit frees, if units have costs of their own.
    """

    rows: Tensor
    places: Tensor | None
    directions: Tensor | None
    inverse: Tensor
    group_of: Tensor
    increments: Tensor
    squares: Tensor
    rounding: Tensor
    rounding_by_norm: Tensor
    costs: Tensor | None

    def __len__(self) -> int:
        return len(self.increments)

    def at(self, units: Tensor, directions: bool) -> FrontUnits:
        """Some of the units, with copies of their data; the rows stay shared."""
        return FrontUnits(
            self.rows,
            units if self.places is None else self.places[units],
            self.directions.index_select(0, units) if directions and self.directions is not None else None,
            self.inverse[units],
            self.group_of[units],
            self.increments[units],
            self.squares[units],
            self.rounding[units],
            self.rounding_by_norm[units],
            None if self.costs is None else self.costs[units],
        )

    def rows_at(self, units: Tensor | list[int]) -> Tensor:
        """(k, N) the rows of some units."""
        return self.rows[units if self.places is None else self.places[units]]

    def products(self, vector: Tensor) -> Tensor:
        """(n,) the product of each unit's row with ``vector`` (N,)."""
        if self.places is None:
            return self.rows @ vector
        products = np.empty(len(self))
        _native.row_products(self.rows.numpy(), self.places.numpy(), vector.numpy(), products)
        return torch.from_numpy(products)


@dataclass
class Comparison:
    """All units compared with those of a round in low precision.

    Attributes:
        near: the units outside the front that may be within reach.
        limits: (G, steps) reach.
        products: for each part of the units, (units, steps + 1): the products of their directions with the sum of the
            rows removed before each step, and after the last.
        scale: what those sums were divided by.
    """

    near: Tensor
    limits: NDArray[np.float64]
    products: list[Tensor]
    scale: float

    def changes(self, step: int, inverse: Tensor) -> Tensor:
        """(n,) by how much the increments change until ``step``, roughly."""
        return torch.cat([part[:, step] for part in self.products]).double().mul_(self.scale).div_(inverse)


@lru_cache(maxsize=1)
def fast_dtype() -> torch.dtype:
    """The dtype whose products are faster on this processor, by trial. The units removed do not depend on it."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = torch.ones(2048, 512, dtype=dtype, device="cpu"), torch.ones(512, 64, dtype=dtype, device="cpu")
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
        norms: (steps,) float64 norms of the sums, whose entries are at most 1.
        rows: number of terms of a product.
    """
    return norms * (FACTOR_ERROR + ADDITION_ERROR * rows) + UNDERFLOW * rows


def rounds_for(units: int, rows: int) -> tuple[tuple[int, int], ...]:
    """The rounds for so many units and rows; empty if steps among all units take less time."""
    if units >= LARGE:
        return ROUNDS
    return SMALL_ROUNDS if units >= SMALL and rows >= MANY_ROWS and fast_dtype() is torch.bfloat16 else ()


def fitting(rounds: Sequence[Pace], units: int) -> list[Pace]:
    """The rounds that are worthwhile among so many units: those whose front is a small share of them."""
    return [pace for pace in rounds if pace.front <= FRONT_SHARE * units]


class Field:
    """Removes units of one set, in rounds. A front is such a set too, and shares the state of the set around it."""

    def __init__(
        self, problem: Problem, units: FrontUnits, state: FrontState, lowest: Tensor, rounds: Sequence[Pace]
    ) -> None:
        self._problem, self._units, self._state, self._lowest = problem, units, state, lowest
        self._rounds = fitting(rounds, len(units))
        assert problem.interacting is not None
        self._strength = 2 * problem.interacting.strength
        self._since: Tensor | None = None  # the sum of rows removed since increments were computed
        self._changes: Tensor | None = None  # of increments by these removals, roughly
        self._alone = 0  # steps to take among all units before the next round
        sizes = torch.bincount(units.group_of, minlength=len(problem.sizes))
        constants = [lowest, problem.costs.curvature, units.squares, units.rounding, units.rounding_by_norm]
        self._steps = _native.GreedySteps(
            sizes.numpy(),
            [value.contiguous().numpy() for value in constants],
            None if units.costs is None else units.costs.numpy(),
            [units.increments.numpy(), *state.arrays()],
            problem.per_cost,
            self._strength,
        )

    def remove(self, count: int, target: float) -> Trace:
        """Remove up to ``count`` units, until ``target`` is freed or none may go."""
        if not self._rounds and self._units.places is not None:
            return self._compiled_steps(count, target)
        trace = Trace()
        while len(trace.picks) < count and float(self._state.freed) < target:
            before = len(trace.picks)
            if self._rounds and self._alone == 0:
                self._round(trace, count - before, target)
            if len(trace.picks) == before and not self._step(trace):
                break
        return trace

    def _compiled_steps(self, count: int, target: float) -> Trace:
        """:meth:`remove` without rounds."""
        assert self._units.places is not None
        picks = np.empty(count, dtype=np.int64)
        reach, states = np.empty((count, len(self._problem.sizes))), np.empty((count, len(self._state.values)))
        rows, places = self._units.rows.numpy(), self._units.places.numpy()
        taken = self._steps.run(rows, places, target, picks, reach, states)
        return Trace(picks[:taken].tolist(), list(reach[:taken]), list(torch.from_numpy(states)[:taken]))

    def _step(self, trace: Trace) -> bool:
        """Remove the best of all units; False if none may go."""
        self._update()
        reach = np.empty(len(self._problem.sizes))
        unit = self._steps.step(None, reach)
        if unit < 0:
            return False
        self._alone = max(self._alone - 1, 0)
        if self._units.squares[unit] > 0:
            row = self._units.rows_at([unit])[0]
            self._units.increments.add_(self._units.products(row), alpha=self._strength)
        trace.extend([unit], Trace([unit], [reach], [self._state.values.clone()]), 1)
        return True

    def _update(self) -> None:
        """Compute the increments of all units in float64."""
        if self._since is not None:
            self._units.increments.add_(self._units.products(self._since), alpha=self._strength)
            self._since = self._changes = None

    def _round(self, trace: Trace, count: int, target: float) -> None:
        """Remove units of a front, and keep the steps that would be the same among all units."""
        pace, units = self._rounds[0], self._units
        front = self._front(pace.front)
        start = self._state.values.clone()
        found = self._among(front).remove(min(pace.steps, count), target)
        picks: list[int] = front[found.picks].tolist()
        kept = 0
        if picks:
            removed = torch.zeros(len(picks) + 1, units.rows.shape[1], dtype=torch.float64, device="cpu")
            if self._since is not None:
                removed[0] = self._since
            removed[1:] = units.rows_at(picks)
            removed = removed.cumsum(0)
            compared = self._compare(front, removed, found.reach)
            kept = self._before_rivals(compared, removed[:-1])
        pace.learn(len(picks), kept)
        self._state.values.copy_([start, *found.states][kept])
        if kept == 0:
            self._alone = PATIENCE
            return
        units.increments[picks[:kept]] = torch.inf
        self._since, self._changes = removed[kept], compared.changes(kept, units.inverse)
        if len(compared.near) > UNCLEAR_SHARE * len(units):
            self._update()
        trace.extend(picks, found, kept)

    def _front(self, size: int) -> Tensor:
        """The units with the lowest scores."""
        scores = self._scores()
        front = scores.topk(size, largest=False, sorted=False).indices
        return front[scores[front] < torch.inf].sort().values

    def _among(self, front: Tensor) -> Field:
        """The units of a front as a set of their own."""
        rounds = self._rounds[1:]
        units = self._units.at(front, directions=bool(fitting(rounds, len(front))))
        if self._since is not None:
            units.increments.add_(units.products(self._since), alpha=self._strength)
        return Field(self._problem, units, self._state, self._lowest, rounds)

    def _scores(self) -> Tensor:
        """(n,) the unit with the smallest one goes next, roughly; infinite for units that stay."""
        state, units = self._state, self._units
        stays = state.widths <= self._lowest
        if units.costs is not None:
            costs = units.costs
        else:
            freed = state.slope - self._problem.costs.curvature.diagonal()
            stays = stays | (freed <= 0)
            costs = freed.masked_fill(stays, 1.0)[units.group_of]
        increments = units.increments if self._changes is None else units.increments + self._changes
        scores = increments.masked_fill(stays[units.group_of], torch.inf)
        if not self._problem.per_cost:
            return scores
        return torch.where(scores < 0, scores * costs, scores / costs)

    def _before_rivals(self, compared: Comparison, removed: Tensor) -> int:
        """The number of steps before the first one at which a unit outside the front could have been removed.

        Args:
            removed: (steps, N) sums of the rows removed before each step.
        """
        units, rivals = self._units, compared.near
        if not len(rivals):
            return len(removed)
        rows = units.rows_at(rivals)
        increments = torch.addmm(units.increments[rivals, None], rows, removed.T, alpha=self._strength)
        limits = compared.limits[units.group_of[rivals].numpy()]
        if units.costs is not None and self._problem.per_cost:
            costs = units.costs[rivals].numpy()[:, None]
            with np.errstate(all="ignore"):  # a cost may be zero
                limits = np.where(limits < 0, limits / costs, limits * costs)
        reached = np.flatnonzero(~(increments.numpy() > limits).all(0))
        return int(reached[0]) if len(reached) else len(removed)

    def _compare(self, front: Tensor, removed: Tensor, reach: Sequence[NDArray[np.float64]]) -> Comparison:
        """Compare all units in low precision with the reach of each step.

        Args:
            front: the round's units, which are no rivals.
            removed: (steps + 1, N) sums of the rows removed before each step, and after the last.
            reach: by step, (G,).
        """
        units = self._units
        assert units.directions is not None
        limits = np.ascontiguousarray(np.stack(reach, 1))
        # After the last step nothing is within reach.
        compared = np.concatenate([limits, np.full((len(limits), 1), -np.inf)], 1)
        scale = max(float(removed.abs().amax()), LEAST)
        scaled = removed / scale
        sums = scaled.T.to(units.directions.dtype)
        slack = product_slack(scaled.norm(dim=1), len(sums)).numpy()
        inverse = (units.inverse / scale).numpy()
        groups, increments = units.group_of.numpy(), units.increments.numpy()
        costs = units.costs.numpy() if units.costs is not None and self._problem.per_cost else None
        near = np.empty(len(units), dtype=np.uint8)
        parts: list[Tensor] = []
        for first in range(0, len(near), ROWS_AT_ONCE):
            part = slice(first, first + ROWS_AT_ONCE)
            parts.append(units.directions[part] @ sums)
            products = parts[-1].float().numpy()
            part_costs = None if costs is None else costs[part]
            _native.find_rivals(
                groups[part], products, increments[part], inverse[part], part_costs, compared, slack, near[part]
            )
        near[front.numpy()] = 0
        return Comparison(torch.from_numpy(near).nonzero()[:, 0], limits, parts, scale)
