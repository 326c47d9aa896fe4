"""The problem that an allocation solves: what may go, what it costs, how much must be freed, and the limits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from obc.model.costs import Costs
from obc.model.groups import ChannelGroup
from obc.selection.choice import Selection


@dataclass(frozen=True)
class Task:
    """The problem that an allocation solves.

    Attributes:
        scores: group -> (N, units) rows or (units,) scores.
        groups: the model's groups, in the order of execution.
        costs: the costs of the present model.
        budget: how much to free, in the unit of the costs.
        selection: how units are chosen within a group.
        shrinkage: shrinkage of interactions in joint selection.
        per_cost: whether scores are divided by what a unit frees, where units of several groups compete.
        min_units: group -> the number of units that must stay (1 if not named).
        round_to: group -> a number of which its width must be a multiple if it loses units (1 if not named).
        full_widths: group -> its unpruned width, which shares refer to; by default the present width.
        families: names of groups that must keep equal widths, and have them now; empty if every width is free. A family
            with a group that has no scores keeps its width.
        widths: group of a family -> the only permitted widths, in addition to the present one; any if not named.
        goal: what this step and later ones must free together. No family goes below the width that it would get now for
            the goal, however far apart the permitted ones are. By default the budget.
        importance: name of a block or group -> importance, for profiles that follow it.
        evaluate: returns the model's output loss with these units of each group masked; for searches.
    """

    scores: Mapping[str, Tensor]
    groups: Sequence[ChannelGroup]
    costs: Costs
    budget: float
    selection: Selection = "independent"
    shrinkage: float | None = None
    per_cost: bool = True
    min_units: Mapping[str, int] = field(default_factory=dict)
    round_to: Mapping[str, int] = field(default_factory=dict)
    full_widths: Mapping[str, int] = field(default_factory=dict)
    families: Sequence[Sequence[str]] = ()
    widths: Mapping[str, Collection[int]] = field(default_factory=dict)
    goal: float | None = None
    importance: Mapping[str, float] = field(default_factory=dict)
    evaluate: Callable[[Mapping[str, Tensor]], float] | None = None

    def suffices(self, lost: Mapping[str, int]) -> bool:
        """Whether the budget is freed, up to rounding, if each group loses so many units."""
        return self.costs.freed(lost) >= self.budget * (1 - 1e-9)

    def scored(self) -> list[ChannelGroup]:
        """The groups of channels with scores; whole blocks are excluded, because no share of one can stay."""
        return [group for group in self.groups if group.name in self.scores and not group.is_depth]
