"""Problems for ``obc.select``, and a plain greedy that computes the loss of every candidate set afresh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import obc
from obc.selection import Costs

Removed = dict[str, list[int]]


@dataclass
class Problem:
    """The arguments of ``obc.select``. Rows and costs are small integers: exact, whatever the order of sums."""

    rows: dict[str, np.ndarray]
    costs: Costs | dict[str, np.ndarray]
    budget: float
    selection: str = "joint"
    shrinkage: float = 0.0
    per_cost: bool = True
    min_units: dict[str, int] | int = 1
    round_to: dict[str, int] | int = 1

    def select(self, **more: Any) -> Removed:
        rows = {name: torch.from_numpy(values) for name, values in self.rows.items()}
        costs = self.costs
        if not isinstance(costs, Costs):
            costs = {name: torch.from_numpy(values) for name, values in costs.items()}
        options = {key: value for key, value in vars(self).items() if key not in ("rows", "costs", "budget")}
        return {name: units.tolist() for name, units in obc.select(rows, costs, self.budget, **options, **more).items()}

    def size(self, name: str) -> int:
        return self.rows[name].shape[1]

    def freed(self, removed: Removed) -> float:
        if not isinstance(self.costs, Costs):
            return float(sum(self.costs[name][units].sum() for name, units in removed.items()))
        widths = [float(self.size(name) - len(removed[name])) for name in self.costs.names]
        return self.costs.total() - self.costs.total(torch.tensor(widths))

    def loss(self, removed: Removed) -> float:
        """sum_n delta[n]^2, products of different units shrunk."""
        picked = np.concatenate([values[:, removed[name]] for name, values in self.rows.items()], 1)
        squares = float(np.square(picked).sum())
        joint = float(np.square(picked.sum(1)).sum())
        keep = 1 - self.shrinkage if self.selection == "joint" else 0.0
        return squares + keep * (joint - squares)

    def score(self, before: Removed, after: Removed) -> float:
        """The smaller the better; infinite where nothing is freed."""
        increment, freed = self.loss(after) - self.loss(before), self.freed(after) - self.freed(before)
        if freed <= 0:
            return np.inf
        if not self.per_cost:
            return increment
        return increment * freed if increment < 0 else increment / freed


def group_value(value: Mapping[str, int] | int, name: str) -> int:
    return value.get(name, 1) if isinstance(value, Mapping) else value


def next_in_group(problem: Problem, removed: Removed, name: str) -> Removed | None:
    """``removed`` with the units that group ``name`` would lose next; None if it may lose nothing."""
    width, multiple = problem.size(name) - len(removed[name]), group_value(problem.round_to, name)
    count = width % multiple or multiple
    if width - count < group_value(problem.min_units, name):
        return None
    after = removed
    for _ in range(count):
        left = [unit for unit in range(problem.size(name)) if unit not in after[name]]
        candidates = [after | {name: [*after[name], unit]} for unit in left]
        before = after
        after = min(candidates, key=lambda candidate: problem.score(before, candidate))
        if problem.score(before, after) == np.inf:
            return None
    return after


def plain_greedy(problem: Problem) -> Removed | None:
    """The definition, step by step; None where nothing more may go before the budget is met."""
    removed: Removed = {name: [] for name in problem.rows}
    while problem.freed(removed) < problem.budget:
        candidates = [next_in_group(problem, removed, name) for name in problem.rows]
        possible = [candidate for candidate in candidates if candidate is not None]
        if not possible:
            return None
        before = removed
        removed = min(possible, key=lambda candidate: problem.score(before, candidate))
    return {name: sorted(units) for name, units in removed.items()}


@st.composite
def problems(draw: st.DrawFn, max_size: int = 6, own_costs: bool = False) -> Problem:
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(1, max_size), min_size=1, max_size=4))
    names = [f"group {place}" for place in range(len(sizes))]
    count = draw(st.integers(1, 8))
    rows = {
        name: generator.integers(-3, 4, (count, size)).astype(np.float32)
        for name, size in zip(names, sizes, strict=True)
    }
    costs: Costs | dict[str, np.ndarray]
    if own_costs:
        costs = {name: generator.integers(0, 9, values.shape[1]).astype(np.float64) for name, values in rows.items()}
        total = float(sum(values.sum() for values in costs.values()))
    else:
        quadratic = torch.from_numpy(generator.integers(0, 9, (len(names), len(names)))).double()
        linear = torch.from_numpy(generator.integers(0, 9, len(names))).double()
        costs = Costs(names, sizes, constant=7, linear=linear, quadratic=quadratic + quadratic.T)
        total = costs.total() - 7
    return Problem(
        rows,
        costs,
        budget=draw(st.floats(0, 1)) * total,
        selection=draw(st.sampled_from(["joint", "joint", "independent"])),
        shrinkage=draw(st.sampled_from([0.0, 0.25, 1.0])),
        per_cost=draw(st.booleans()),
        min_units=draw(st.one_of(st.integers(0, 2), st.just({names[-1]: 3}))),
        round_to=draw(st.one_of(st.sampled_from([1, 1, 2, 3]), st.just({names[0]: 2}))),
    )


def correlated_rows(sizes: Sequence[int], count: int, twins: bool = True) -> dict[str, Tensor]:
    """Rows of units that share directions, like those of a network; every seventh unit is equal to the one before."""
    rank = max(1, count // 4)
    shared = torch.randn(count, rank)
    rows = {}
    for place, size in enumerate(sizes):
        values = shared @ torch.randn(rank, size) / rank**0.5 + 0.5 * torch.randn(count, size)
        values *= torch.rand(size).mul(3).exp()
        if twins:
            values[:, 7::7] = values[:, 6:-1:7][:, : values[:, 7::7].shape[1]]
        rows[f"layer {place}"] = values
    return rows


def chained_costs(rows: Mapping[str, Tensor]) -> Costs:
    """Every group's layer reads the group before, with a 3 x 3 kernel on 8 x 8 positions."""
    sizes = [values.shape[-1] for values in rows.values()]
    quadratic = torch.diag(torch.full((len(sizes) - 1,), 9.0 * 64), 1)
    linear = torch.zeros(len(sizes))
    linear[0], linear[-1] = 27 * 64, 10
    return Costs(list(rows), sizes, linear=linear, quadratic=quadratic)


def as_lists(removed: Mapping[str, Tensor]) -> Removed:
    return {name: units.tolist() for name, units in removed.items()}


MANY_SIZES = (130, 1, 64, 257)
