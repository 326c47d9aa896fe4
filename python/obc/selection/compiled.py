"""The greedy choice on the CPU in a compiled step on one thread; same choices as :mod:`obc.selection.greedy`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from obc.selection.greedy import BUDGET_ROUNDING, Greedy, Problem
from obc.selection.interactions import BlockedGram

try:
    import obc._native as _native
    from obc.selection import fronts
except ImportError:  # obc was installed without a compiler: obc info says so
    _native = None  # type: ignore[assignment]


def greedy(problem: Problem) -> Greedy:
    """The choice for this problem: compiled if available, on the CPU, for single units at linear costs."""
    on_cpu = problem.increments.device.type == "cpu"
    if _native is None or not on_cpu or max(problem.multiples) > 1 or problem.costs.effective is not None:
        return Greedy(problem)
    columns = None if problem.interacting is None else problem.interacting.columns
    if isinstance(columns, BlockedGram) and columns.copy_fits and (rounds := fronts.rounds_for(*columns.units.shape)):
        return FrontGreedy(problem, columns.units, rounds)
    return CompiledGreedy(problem)


class CompiledGreedy(Greedy):
    """:class:`Greedy` whose steps are ``csrc/cpu/greedy.cpp``.

    Steps made of tensor operations pay for each operation's overhead and wake idle threads; a compiled step reads the
    units once. Columns of the Gram matrix still come from torch.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        costs, interacting = problem.costs, problem.interacting
        constants = (self._lowest, costs.curvature, self._squares, self._rounding, self._rounding_by_norm)
        self._freed, self._removed_squares = self._freed.reshape(1), self._removed_squares.reshape(1)
        state = (self._increments, self._widths, self._slope, self._removed_squares, self._freed)
        self._steps = _native.GreedySteps(
            np.array(problem.sizes, dtype=np.int64),
            [_array(value) for value in constants],
            None if costs.unit_costs is None else _array(costs.unit_costs),
            [value.numpy() for value in state],
            problem.per_cost,
            0.0 if interacting is None else 2 * interacting.strength,
        )

    @torch.inference_mode()
    def until(self, budget: float) -> tuple[Tensor, float]:
        """As :meth:`Greedy.until`, in compiled steps."""
        target = budget * (1 - BUDGET_ROUNDING)
        freed = self._freed.numpy()
        order: list[int] = []
        column: Any = None
        while True:
            unit = self._steps.step(column)
            if unit < 0:
                break
            order.append(unit)
            if freed[0] >= target:
                break
            if self._interacting is not None:
                column = self._interacting.columns.column(unit, self.standing).numpy()
        return torch.tensor(order, dtype=torch.int64, device="cpu"), float(freed[0])


class FrontGreedy(Greedy):
    """:class:`Greedy` by :mod:`obc.selection.fronts`: few columns of a large Gram matrix are computed whole."""

    def __init__(self, problem: Problem, rows: Tensor, rounds: Sequence[tuple[int, int]]) -> None:
        super().__init__(problem)
        assert problem.interacting is not None
        norms = self._squares.sqrt().clamp_(min=fronts.LEAST)
        self._state = fronts.FrontState(self._widths, self._slope, self._removed_squares, self._freed)
        units = fronts.FrontUnits(
            rows.contiguous(),
            None,
            (rows / norms[:, None]).to(fronts.fast_dtype()),
            1 / (norms * (2 * problem.interacting.strength)),
            self._group_of,
            self._increments,
            self._squares,
            self._rounding,
            self._rounding_by_norm,
            problem.costs.unit_costs,
        )
        paces = [fronts.Pace(*size) for size in rounds]
        self._field = fronts.Field(problem, units, self._state, self._lowest, paces)

    @torch.inference_mode()
    def until(self, budget: float) -> tuple[Tensor, float]:
        """As :meth:`Greedy.until`, in rounds among the units that go next."""
        removed = self._field.remove(len(self._increments), budget * (1 - BUDGET_ROUNDING))
        return torch.tensor(removed.picks, dtype=torch.int64, device="cpu"), float(self._state.freed)


def _array(value: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return value.contiguous().numpy()
