"""Selection under equal widths: which units go within each group, where how many go is the same for all of a family."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from obc.model.costs import Costs
from obc.selection.choice import BudgetError, Selection, select

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
    full_widths: Mapping[str, int] | None = None,
    widths: Mapping[str, Collection[int]] | None = None,
    goal: float | None = None,
    shares: Callable[[str, float], float] | None = None,
) -> dict[str, Tensor]:
    """Units to remove that free ``budget``, with equal widths within every family.

    Every family keeps the same share of its full width, to the nearest permitted one: the largest share that frees the
    budget. Families that came out below their share, one after another, keep the next width above it where the others
    free enough. Which units go is chosen by :func:`obc.select` within each group alone.

    Args:
        rows_by_group: as for :func:`obc.select`. Families of which a group has no rows keep their widths.
        costs: of the model.
        budget: how much to free, in the unit of the costs.
        families: names of groups that keep equal widths; they have equal widths now.
        selection: as for :func:`obc.select`, within each group.
        shrinkage: the same.
        min_units: by group, how many units stay (1 where not named).
        round_to: by group, a multiple of which stays where units go (1 where not named).
        full_widths: by group, what the share is of, for families that lost units before; by default the widths now.
        widths: by group, the only ones that it may come to; any where it is not named. The width now is permitted.
        goal: what this and later calls free together: no family goes below the width that it has in the end, however
            far apart the permitted ones are. By default the budget.
        shares: shares(name of a family's first group, level) -> the share that it keeps at a level in [0, 1]; grows
            with the level up to 1. By default every family keeps the level itself.

    Returns:
        By group the indices of the units to remove: int64, ascending, on the CPU.

    Raises:
        BudgetError: the budget can't be met.
        ValueError: groups of a family have different widths.
    """
    sizes = {name: int(width) for name, width in zip(costs.names, costs.widths, strict=True)}
    limits = []
    for family in families:
        found = {sizes[name] for name in family}
        if len(found) > 1:
            raise ValueError(f"groups of one family have different widths: {', '.join(family)} have {sorted(found)}")
        if all(name in rows_by_group for name in family):
            size = found.pop()
            lowest = max((min_units or {}).get(name, 1) for name in family)
            multiple = math.lcm(*((round_to or {}).get(name, 1) for name in family))
            only = [set((widths or {})[name]) for name in family if name in (widths or {})]
            permitted = permitted_widths(size, lowest, multiple, set.intersection(*only) if only else None)
            limits.append(_Limits(family, (full_widths or sizes)[family[0]], permitted))

    def freed(kept: Mapping[str, int]) -> float:
        return costs.freed({name: sizes[name] - width for name, width in kept.items()})

    if goal is not None and goal > budget:
        final = _widths(limits, freed, goal, shares)
        limits = [limit.at_least(final[limit.family[0]]) for limit in limits]
    kept = _widths(limits, freed, budget, shares)
    removed = {name: torch.empty(0, dtype=torch.int64) for name in rows_by_group}
    for name, width in kept.items():
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


def permitted_widths(size: int, lowest: int, multiple: int, only: Collection[int] | None = None) -> Sequence[int]:
    """The widths that a group of ``size`` units may come to, ascending; the last is ``size`` itself.

    Args:
        size: the width now.
        lowest: so many units stay.
        multiple: a multiple of this stays where units go.
        only: the widths to choose from; None: any.
    """
    least = -(-lowest // multiple) * multiple
    return [*(width for width in range(least, size, multiple) if only is None or width in only), size]


def _widths(
    limits: Sequence[_Limits],
    freed: Callable[[Mapping[str, int]], float],
    budget: float,
    shares: Callable[[str, float], float] | None,
) -> dict[str, int]:
    """By group, the widths at the largest level that frees the budget."""

    def share_of(limit: _Limits, level: float) -> float:
        return level if shares is None else shares(limit.family[0], level)

    def kept(level: float) -> dict[str, int]:
        return {name: limit.width(share_of(limit, level)) for limit in limits for name in limit.family}

    most = freed(kept(0.0))
    if most < budget:
        raise BudgetError(f"equal widths free at most {most:g} of the {budget:g} to be freed", most)
    enough, too_large = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (enough + too_large) / 2
        if freed(kept(middle)) >= budget:
            enough = middle
        else:
            too_large = middle
    widths = kept(enough)
    for limit in limits:
        wider = widths | dict.fromkeys(limit.family, limit.width_above(share_of(limit, too_large)))
        if wider[limit.family[0]] > widths[limit.family[0]] and freed(wider) >= budget:
            widths = wider
    return widths


@dataclass(frozen=True)
class _Limits:
    """What the width of a family may be."""

    family: Sequence[str]
    full: int
    permitted: Sequence[int]

    def width(self, share: float) -> int:
        """The permitted width nearest to a share of the full one; of two the larger."""
        wanted = share * self.full
        place = bisect_left(self.permitted, wanted)
        nearest = self.permitted[max(place - 1, 0) : place + 1]
        return min(nearest, key=lambda width: (abs(width - wanted), -width))

    def width_above(self, share: float) -> int:
        """The smallest permitted width that is at least a share of the full one, where there is one."""
        return self.permitted[min(bisect_left(self.permitted, share * self.full), len(self.permitted) - 1)]

    def at_least(self, width: int) -> _Limits:
        """The same, but for smaller widths."""
        return replace(self, permitted=self.permitted[bisect_left(self.permitted, width) :])
