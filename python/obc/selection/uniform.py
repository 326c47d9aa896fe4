"""Selection under equal widths: which units go within each group, where how many go is the same for all of a family."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

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
    full_widths: Mapping[str, int] | None = None,
    widths: Mapping[str, Collection[int]] | None = None,
) -> dict[str, Tensor]:
    """Units to remove that free ``budget``, with equal widths within every family.

    Every family keeps the same share of its full width, to the nearest permitted one: the largest share that frees the
    budget. Which units go is chosen by :func:`obc.select` within each group alone.

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

    def freed(shares: Sequence[float]) -> float:
        kept = {**sizes, **_kept(limits, shares)}
        return costs.total() - costs.total(torch.tensor([kept[name] for name in costs.names]))

    most = freed([0.0] * len(limits))
    if most < budget:
        raise BudgetError(f"equal widths free at most {most:g} of the {budget:g} to be freed", most)
    enough, too_large = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (enough + too_large) / 2
        if freed([middle] * len(limits)) >= budget:
            enough = middle
        else:
            too_large = middle
    # Where widths of several families change at this very share, not all of them may have to.
    shares = [enough] * len(limits)
    for index in range(len(limits)):
        wider = [*shares[:index], too_large, *shares[index + 1 :]]
        shares = wider if freed(wider) >= budget else shares
    removed = {name: torch.empty(0, dtype=torch.int64) for name in rows_by_group}
    for name, width in _kept(limits, shares).items():
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


def _kept(limits: Sequence[_Limits], shares: Sequence[float]) -> dict[str, int]:
    return {name: limit.width(share) for limit, share in zip(limits, shares, strict=True) for name in limit.family}


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
