"""Selection under equal widths: all groups of a family lose equally many units, chosen within each group."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from obc.model.costs import Costs
from obc.selection.choice import BudgetError, removal_order
from obc.selection.task import Task

# Number of halvings of the kept share, beyond the resolution of any width.
_HALVINGS = 50


def select_uniform(
    task: Task, families: Sequence[Sequence[str]], shares: Callable[[str, float], float] | None = None
) -> dict[str, Tensor]:
    """Choose units that free the task's budget, with equal widths within every one of these families.

    Every family keeps the same share of its full width, rounded to the nearest permitted width: the largest share that
    frees the budget. Then families that came out below their share get the next width above it, one after another, if
    the others still free enough. Within each group :func:`obc.select` chooses the units.

    Args:
        task: the problem, apart from its families.
        families: names of groups that keep equal widths.
        shares: shares(name of a family's first group, level) -> the share that it keeps at a level in [0, 1]; it grows
            with the level up to 1. By default the share is the level.

    Returns:
        Group -> the indices of the units to remove: int64, ascending, on the CPU.

    Raises:
        BudgetError: the budget can't be met.
        ValueError: groups of a family have different widths.
    """
    costs, sizes = task.costs, task.costs.sizes
    limits = equal_widths(task, families, task.full_widths)
    if task.goal is not None and task.goal > task.budget:
        final = equal_shares(limits, costs, task.goal, shares)
        limits = [limit.at_least(final[limit.family[0]]) for limit in limits]
    kept = equal_shares(limits, costs, task.budget, shares)
    removed = {name: torch.empty(0, dtype=torch.int64, device="cpu") for name in task.scores}
    for name, width in kept.items():
        if (count := sizes[name] - width) > 0:
            order = removal_order(task.scores[name], count, selection=task.selection, shrinkage=task.shrinkage)
            removed[name] = order.sort().values
    return removed


def permitted_widths(size: int, lowest: int, multiple: int, only: Collection[int] | None = None) -> Sequence[int]:
    """The permitted widths of a group of ``size`` units, ascending; the last is ``size`` itself.

    Args:
        size: the present width.
        lowest: the number of units that must stay.
        multiple: a smaller width must be a multiple of this.
        only: the widths to choose from; None allows any.
    """
    least = -(-lowest // multiple) * multiple
    return [*(width for width in range(least, size, multiple) if only is None or width in only), size]


@dataclass(frozen=True)
class EqualWidths:
    """The widths that a family may keep.

    Attributes:
        family: names of its groups.
        full: the width that shares refer to.
        permitted: its widths, ascending; the last is the present one.
    """

    family: Sequence[str]
    full: int
    permitted: Sequence[int]

    def width(self, share: float) -> int:
        """The permitted width nearest to a share of the full one, the larger of two."""
        wanted = share * self.full
        place = bisect_left(self.permitted, wanted)
        nearest = self.permitted[max(place - 1, 0) : place + 1]
        return min(nearest, key=lambda width: (abs(width - wanted), -width))

    def width_above(self, share: float) -> int:
        """The smallest permitted width of at least a share of the full one, if there is one."""
        return self.permitted[min(bisect_left(self.permitted, share * self.full), len(self.permitted) - 1)]

    def at_least(self, width: int) -> EqualWidths:
        """The same family without smaller widths."""
        return replace(self, permitted=self.permitted[bisect_left(self.permitted, width) :])


def equal_widths(
    task: Task, families: Sequence[Sequence[str]], full_widths: Mapping[str, int] | None = None
) -> list[EqualWidths]:
    """The families all of whose groups have scores; their shares refer to ``full_widths``, or the present widths."""
    sizes, limits = task.costs.sizes, []
    for family in families:
        found = {sizes[name] for name in family}
        if len(found) > 1:
            raise ValueError(f"groups of one family have different widths: {', '.join(family)} have {sorted(found)}")
        if all(name in task.scores for name in family):
            lowest = max(task.min_units.get(name, 1) for name in family)
            multiple = math.lcm(*(task.round_to.get(name, 1) for name in family))
            only = [set(task.widths[name]) for name in family if name in task.widths]
            permitted = permitted_widths(found.pop(), lowest, multiple, set.intersection(*only) if only else None)
            limits.append(EqualWidths(family, (full_widths or sizes)[family[0]], permitted))
    return limits


def equal_shares(
    limits: Sequence[EqualWidths], costs: Costs, budget: float, shares: Callable[[str, float], float] | None = None
) -> dict[str, int]:
    """Per group, the widths at the largest level that frees the budget; ``shares`` as for :func:`select_uniform`."""
    sizes = costs.sizes

    def share_of(limit: EqualWidths, level: float) -> float:
        return level if shares is None else shares(limit.family[0], level)

    def kept(level: float) -> dict[str, int]:
        return {name: limit.width(share_of(limit, level)) for limit in limits for name in limit.family}

    def freed(widths: Mapping[str, int]) -> float:
        return costs.freed({name: sizes[name] - width for name, width in widths.items()})

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
