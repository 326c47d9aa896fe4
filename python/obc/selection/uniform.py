"""Selection under equal widths: which units go within each group, where how many go is the same for all of a family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from obc.selection.choice import BudgetError, Selection, select
from obc.selection.costs import Costs

# Halvings of the kept share: beyond the resolution of any width.
_HALVINGS = 50


def select_uniform(
    rows_by_group: Mapping[str, Tensor],
    costs: Costs,
    budget: float,
    families: Sequence[Sequence[str]],
    *,
    selection: Selection = "joint",
    shrinkage: float | None = None,
    min_units: Mapping[str, int] | None = None,
    round_to: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Units to remove that free ``budget``, with equal widths within every family.

    Every family keeps the same share of its units, the largest that frees the budget; rounding and minima apply to the
    widths that follow. Which units go is chosen by :func:`obc.select` within each group alone.

    Args:
        rows_by_group: as for :func:`obc.select`. Families of which a group has no rows keep their widths.
        costs: of the model.
        budget: how much to free, in the unit of the costs.
        families: names of groups that keep equal widths; they have equal widths now.
        selection: as for :func:`obc.select`, within each group.
        shrinkage: the same.
        min_units: by group, how many units stay (1 where not named).
        round_to: by group, a multiple of which stays where units go (1 where not named).

    Returns:
        By group the indices of the units to remove: int64, ascending, on the CPU.

    Raises:
        BudgetError: the budget can't be met.
        ValueError: groups of a family have different widths.
    """
    sizes = {name: int(width) for name, width in zip(costs.names, costs.widths, strict=True)}
    limits = []
    for family in families:
        widths = {sizes[name] for name in family}
        if len(widths) > 1:
            raise ValueError(f"groups of one family have different widths: {', '.join(family)} have {sorted(widths)}")
        if all(name in rows_by_group for name in family):
            lowest = max((min_units or {}).get(name, 1) for name in family)
            multiple = max((round_to or {}).get(name, 1) for name in family)
            limits.append((family, widths.pop(), min(lowest, sizes[family[0]]), multiple))

    def kept(share: float) -> dict[str, int]:
        return {
            name: _width(size, share, lowest, multiple) for family, size, lowest, multiple in limits for name in family
        }

    def freed(share: float) -> float:
        widths = {**sizes, **kept(share)}
        return costs.total() - costs.total(torch.tensor([widths[name] for name in costs.names]))

    if freed(0.0) < budget:
        raise BudgetError(f"equal widths free at most {freed(0.0):g} of the {budget:g} to be freed", freed(0.0))
    enough, too_much = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (enough + too_much) / 2
        if freed(middle) >= budget:
            enough = middle
        else:
            too_much = middle
    removed = {name: torch.empty(0, dtype=torch.int64) for name in rows_by_group}
    for name, width in kept(enough).items():
        if width < sizes[name]:
            chosen = select(
                {name: rows_by_group[name]},
                {name: 1.0},
                sizes[name] - width,
                selection=selection,
                shrinkage=shrinkage,
            )
            removed[name] = chosen[name]
    return removed


def _width(size: int, share: float, lowest: int, multiple: int) -> int:
    """The largest permitted width within a share of ``size``; ``size`` itself where no smaller one is permitted."""
    if share >= 1:
        return size
    width = int(share * size) // multiple * multiple
    return min(size, max(width, -(-lowest // multiple) * multiple))
