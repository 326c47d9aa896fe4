"""obc.select: chooses the units to remove so that enough is freed and the loss changes least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from obc.model.arguments import listed
from obc.model.autocast import without_autocast
from obc.model.costs import Costs
from obc.selection import checks
from obc.selection.caps import Caps
from obc.selection.compiled import greedy
from obc.selection.greedy import BUDGET_ROUNDING, Greedy, Interacting, Problem
from obc.selection.interactions import Form, choose_form, columns_of, estimated_shrinkage, products_within
from obc.selection.whole_blocks import BlockGreedy, inside_of

Selection = Literal["joint", "independent"]
MAX_BYTES = 2**31  # for the Gram matrix of the rows


class BudgetError(ValueError):
    """A budget that can't be met; ``reachable`` is the most that can be freed."""

    def __init__(self, message: str, reachable: float) -> None:
        super().__init__(message)
        self.reachable = reachable


def select(
    rows_by_group: Mapping[str, Tensor],
    costs: Costs | Mapping[str, float | Tensor],
    budget: float,
    *,
    selection: Selection = "joint",
    shrinkage: float | None = None,
    per_cost: bool = True,
    min_units: int | Mapping[str, int] = 1,
    round_to: int | Mapping[str, int] | None = None,
    max_pruning_ratio: float | Mapping[str, float] = 1.0,
    protected_blocks: int | tuple[int, int] = 0,
    form: Form | None = None,
    max_bytes: int = MAX_BYTES,
) -> dict[str, Tensor]:
    """Choose units greedily that free ``budget`` and change the loss least.

    Let r_u[n] be the first-order change of the loss of row n when unit u is removed. Removing a set S changes it by
    delta[n] = sum_{u in S} r_u[n]. "joint" minimises sum_n delta[n]^2. With R the (N, C) rows of all units, u adds

        (R^T R)_uu + 2 (1 - shrinkage) sum_{h in S} (R^T R)_uh

    to it; the next unit is the one that adds least per amount freed. "independent" minimises the sum of the (R^T R)_uu.
    If u adds less than nothing, because it cancels what others changed, the negative number is multiplied by what u
    frees instead of divided: of two equal ones, the one that frees more is better. Such units are removed before all
    others.

    Costs follow the removals: with :class:`obc.selection.Costs` each removal changes what the others free, and the
    total freed is the exact difference of the polynomial.

    With ``round_to`` a group loses at once as many units as lead to its next multiple, picked one after another; groups
    are compared by what these units add and free together. The last removal may exceed the budget.

    Everything is computed in float64 on the device of the first group's rows; the host waits for it once in 32 steps.
    Of units that are equal up to rounding, the first one of the first group is removed. The result thus depends neither
    on the number of threads, nor on the device, nor on ``form``, the way in which R^T R is held:

    ========= ============================== =================== ======================
    form      operations                     read in each step   bytes
    ========= ============================== =================== ======================
    "full"    2 C^2 N before the first step  8 C                 8 C^2
    "blocked" 2 C N a column, in blocks      8 C                 at most ``max_bytes``
    "rows"    2 C N a step                   8 C N               none
    ========= ============================== =================== ======================

    in addition to a float64 copy of the rows, 8 C N bytes. "blocked" reads as "rows" does when too many columns would
    be computed in vain. Of many units on a CPU (32,768; or 12,000 with 256 rows, where products of bfloat16 are fast),
    "blocked" computes the products of few units exactly, and shows by products of low precision (from a copy of the
    rows, at most 4 C N bytes) that no other unit goes first.
    The default is "rows" if N is small or several units are removed per step; otherwise "full" if it fits
    ``max_bytes`` (on a CPU only up to 2048 channels); otherwise "blocked" on a CPU and "rows" elsewhere.

    Args:
        rows_by_group: (N, units) rows of every group, for example :meth:`ChannelGroup.gate_rows`. "independent" also
            accepts (units,) scores, which are used unchanged.
        costs: a :class:`obc.selection.Costs`, such as ``structure.costs("macs")``, ``structure.memory(use)``, or the
            seconds of :meth:`obc.LatencyTable.costs`; its groups without rows keep their widths. Or, by group, the cost
            of each unit as one number or as a (units,) tensor. Units that free nothing stay, unless the costs have
            curves that fall further on; then groups are compared by the best rate on the way to any smaller width. A
            group that has others ``inside`` it, according to the costs, is a whole block: its one unit frees what is
            left of the units inside, which then can't be removed individually, and adds to the loss what their removal
            did not add.
        budget: how much to free, in the unit of the costs; no share of them, as :func:`obc.prune` takes it.
        selection: "joint" or "independent".
        shrinkage: 0 counts interactions as the rows have them, 1 ignores them. None means 0 with at least as many rows
            as units. Fewer rows can't tell interactions from noise; then it is estimated from the rows, with a warning
            (:func:`obc.selection.estimated_shrinkage`).
        per_cost: False compares what units add, without regard to what they free.
        min_units: the number of units that must stay in every group, or by group (1 if not named).
        round_to: keep the widths of groups that lose units at a multiple of this, or by group (1 if not named).
        max_pruning_ratio: the largest share of its units that any group loses; or by name of a group or block, such as
            "model.layers.0" (1 if not named).
        protected_blocks: the number of blocks at the start and at the end that lose nothing, or a pair of numbers.
            Groups must come in the order of execution; a block is a group's name up to its first number.
        form: how R^T R is held; None chooses by size.
        max_bytes: limit for R^T R, or for the part of it that is held.

    Returns:
        Group -> the indices of the units to remove: int64, ascending, on the CPU; empty if none is removed.

    Raises:
        BudgetError: the budget can't be met; the message says how much can.
        ValueError: rows or costs are not finite, empty, or of different groups; or an argument is out of range.
        TypeError: rows don't have a floating-point dtype.
    """
    caps = Caps.of(max_pruning_ratio, protected_blocks)
    order = _order(
        rows_by_group, costs, budget, selection, shrinkage, per_cost, min_units, round_to, caps, form, max_bytes
    )
    sizes = [values.shape[-1] for values in rows_by_group.values()]
    removed = dict(zip(rows_by_group, _by_group(order, sizes), strict=True))
    inside = inside_of(list(rows_by_group), costs.inside) if isinstance(costs, Costs) else {}
    channels = {name: units for place, (name, units) in enumerate(removed.items()) if place not in inside}
    checks.warn_if_narrow(channels, [size for place, size in enumerate(sizes) if place not in inside])
    return removed


def removal_order(
    rows: Tensor, count: int, *, selection: Selection = "joint", shrinkage: float | None = None
) -> Tensor:
    """The first ``count`` units that :func:`select` removes from one group, in this order: int64, on the CPU."""
    group = "the group"
    return _order({group: rows}, {group: 1.0}, count, selection, shrinkage, False, 0, None, Caps(), None, MAX_BYTES)


def _order(
    rows_by_group: Mapping[str, Tensor],
    costs: Costs | Mapping[str, float | Tensor],
    budget: float,
    selection: Selection,
    shrinkage: float | None,
    per_cost: bool,
    min_units: int | Mapping[str, int],
    round_to: int | Mapping[str, int] | None,
    caps: Caps,
    form: Form | None,
    max_bytes: int,
) -> Tensor:
    """The units that :func:`select` removes, numbered over all groups, in the order of their removal."""
    checks.check_arguments(selection, shrinkage, form, max_bytes, budget, per_cost)
    rows = checks.checked_rows(rows_by_group, selection)
    names, sizes = list(rows_by_group), [values.shape[-1] for values in rows]
    lowest, multiples = checks.limits(names, sizes, min_units, round_to)
    capped = caps.least(dict(zip(names, sizes, strict=True)))
    lowest = [max(least, capped[name]) for name, least in zip(names, lowest, strict=True)]
    removal_costs = checks.removal_costs(names, sizes, costs, lowest, rows[0].device)
    inside = inside_of(names, costs.inside) if isinstance(costs, Costs) else {}
    checks.warn_if_free(names, sizes, removal_costs, inside)
    checks.warn_if_a_share(budget, removal_costs)
    interacting = None
    with without_autocast():
        if selection == "joint":
            units = checks.stacked(rows)
            checks.warn_if_all_equal(units, "rows")
            increments, count = units.square().sum(1), units.shape[1]
            if shrinkage is None:
                checks.warn_if_few_rows(units)
                shrinkage = estimated_shrinkage(units) if count < len(units) else 0.0
            if shrinkage < 1:
                interacting = _interacting(units, sizes, max(multiples), 1 - shrinkage, form, max_bytes)
        else:
            scores = [values.double() if values.dim() == 1 else values.double().square().sum(0) for values in rows]
            increments, count = torch.cat(scores), max(values[..., 0].numel() for values in rows)
            checks.warn_if_all_equal(increments, "scores")
        problem = Problem(increments, sizes, lowest, multiples, removal_costs, per_cost, count, interacting, inside)
        solver = BlockGreedy(problem, units if selection == "joint" else None) if inside else greedy(problem)
        unit = costs.unit if isinstance(costs, Costs) else "of the given costs"
        return _within_budget(names, problem, solver, budget, unit)


def _interacting(
    units: Tensor, sizes: Sequence[int], longest: int, strength: float, form: Form | None, max_bytes: int
) -> Interacting:
    chunks = longest > 1
    form = form or choose_form(units, sizes, chunks=chunks, max_bytes=max_bytes)
    within = products_within(units, sizes, max_bytes) if chunks else None
    return Interacting(columns_of(form, units, max_bytes), within, strength)


def _within_budget(names: Sequence[str], problem: Problem, solver: Greedy, budget: float, unit: str) -> Tensor:
    """The units that free ``budget``, in the order of their removal."""
    if budget == 0:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    reachable = problem.reachable()
    enough = budget * (1 - BUDGET_ROUNDING)
    freed = 0.0
    if reachable >= enough:
        chosen, freed = solver.until(budget)
        if freed < enough and problem.costs.unit_costs is not None:
            # Cheap units were removed where expensive ones were needed: allow only those that free the most in their
            # groups.
            chosen, freed = greedy(_dearest(problem)).until(budget)
        if freed >= enough:
            return chosen
        reachable = freed
    widths = zip(names, problem.lowest, problem.sizes, strict=True)
    least = listed([f"{name!r}: {lowest} of {size} units" for name, lowest, size in widths], 5)
    raise BudgetError(
        f"a budget of {budget:g} {unit} can't be met: at most {reachable:g} can be freed, where all groups keep their "
        f"least ({least}); lower the budget, min_units or round_to, raise caps, or give rows of more groups",
        reachable,
    )


def _dearest(problem: Problem) -> Problem:
    """The problem restricted to the units that free what is reachable, if units have their own costs."""
    costs = problem.costs
    assert costs.unit_costs is not None
    only = torch.zeros_like(costs.unit_costs)
    parts = zip(only.split(list(problem.sizes)), costs.unit_costs.split(list(problem.sizes)), strict=True)
    for (allowed, values), size, lowest in zip(parts, problem.sizes, problem.lowest, strict=True):
        dearest = values.argsort(descending=True, stable=True)[: size - lowest]
        allowed[dearest] = values[dearest]
    return replace(problem, costs=replace(costs, unit_costs=only))


def _by_group(chosen: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    gone = torch.zeros(sum(sizes), dtype=torch.bool, device="cpu")
    gone[chosen] = True
    return [part.nonzero().flatten() for part in gone.split(list(sizes))]
