"""Allocations: how much each group loses, with any criterion. Scores then decide which of its units are removed."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from obc.model.arguments import number
from obc.model.costs import Costs
from obc.selection.balance import select_balanced
from obc.selection.caps import block_of, found_for
from obc.selection.choice import BudgetError, select
from obc.selection.task import Task
from obc.selection.uniform import select_uniform

# Steepness of a sigmoid profile: an importance one standard deviation off shifts its argument by 1.
_STEEPNESS = 1.0


class Allocation(Protocol):
    """Decides how much each group loses. Optional ``needs`` names statistics to collect with the criterion's."""

    def select(self, task: Task) -> dict[str, Tensor]:
        """Choose units that free the budget.

        Args:
            task: scores, costs, budget and limits.

        Returns:
            Group -> the indices of the units to remove: int64, ascending, on the CPU; empty if none is removed.

        Raises:
            BudgetError: the budget can't be met.
            ValueError: the allocation can't be had with what the task holds, such as equal widths.
        """


class Global:
    """Units of all groups compete; if families keep equal widths, the families do (:mod:`obc.selection.balance`)."""

    def select(self, task: Task) -> dict[str, Tensor]:
        """Units of every group by :func:`obc.select`, or by :func:`obc.selection.balance.select_balanced`."""
        if task.families:
            return select_balanced(task)
        return select(
            task.scores,
            task.costs,
            task.budget,
            selection=task.selection,
            shrinkage=task.shrinkage,
            per_cost=task.per_cost,
            min_units={name: task.min_units.get(name, 1) for name in task.scores},
            round_to={name: task.round_to.get(name, 1) for name in task.scores},
        )


class Uniform:
    """Every group keeps the same share of its units."""

    def select(self, task: Task) -> dict[str, Tensor]:
        """The lowest units of every group, or family, the same share of each."""
        return select_uniform(task, task.families or [[group.name] for group in task.scored()])


class Equal:
    """Groups of one kind and of equal width keep equal widths, and all kinds keep the same share."""

    def select(self, task: Task) -> dict[str, Tensor]:
        """The lowest units of every group, equal widths within a kind."""
        if task.families:
            return select_uniform(task, task.families)
        families: dict[tuple[str, int], list[str]] = {}
        for group in task.scored():
            families.setdefault((group.kind, group.size), []).append(group.name)
        return select_uniform(task, list(families.values()))


class Profile:
    """Each group loses the share min(1, t a), with its own strength a and one t for all groups.

    Args:
        strengths: name of a group or block (a part of names that ends at a dot) -> a >= 0; 1 if not named.

    Raises:
        ValueError: a strength is negative or not finite.
    """

    def __init__(self, strengths: Mapping[str, float]) -> None:
        for name, value in strengths.items():
            number(f"the strength of {name!r}", value)
        if bad := [name for name, value in strengths.items() if not 0 <= value < math.inf]:
            raise ValueError(
                f"a profile's strengths must be finite and not negative, got {strengths[bad[0]]} for {bad[0]!r}"
            )
        self.strengths = dict(strengths)

    def of(self, task: Task) -> dict[str, float]:
        """Group -> a, for the groups that the ``task`` scores."""
        return {group.name: found_for(group.name, self.strengths, 1.0) for group in task.scored()}

    def select(self, task: Task) -> dict[str, Tensor]:
        """The lowest units of every group, up to its share; t is just large enough for the budget."""
        if task.families:
            raise ValueError("a profile gives groups different widths: it can't be had with equal ones (uniform=True)")
        strengths = self.of(task)

        def share(name: str, level: float) -> float:
            if strengths[name] == 0:
                return 1.0
            return 1.0 if level >= 1 else max(0.0, 1 - (1 - level) / max(level, 1e-12) * strengths[name])

        return select_uniform(task, [[name] for name in strengths], share)


class LogProfile(Profile):
    """The lost share grows with the logarithm of depth from ``first`` to ``last``, up to a common factor (SlimGPT).

    Args:
        first: lost share of the first block.
        last: lost share of the last block.

    Raises:
        ValueError: a share is not positive.
    """

    def __init__(self, first: float = 0.0625, last: float = 0.25) -> None:
        if not first > 0 or not last > 0:
            raise ValueError(f"LogProfile needs positive shares, got {first} and {last}")
        self.first, self.last = first, last

    def of(self, task: Task) -> dict[str, float]:
        """The strength of every group, from its block's place."""
        blocks = list(dict.fromkeys(block_of(group.name) for group in task.scored()))
        rise = {
            block: self.first + (self.last - self.first) * math.log1p(place) / (math.log(len(blocks)) or 1.0)
            for place, block in enumerate(blocks)
        }
        return {group.name: rise[block_of(group.name)] for group in task.scored()}


class BlockProfile(Profile):
    """Blocks that change their input more keep more.

    With I the importance of a group's block and z its z-score over the blocks: "sigmoid" makes the kept share
    proportional to sigma(z); "linear" makes the lost share proportional to 1 - I / max I + 0.1.

    Args:
        by: "angle" is E arccos(cos) / pi, "cosine" is 1 - E cos, of block input and output.
        shape: "sigmoid" (CFSP) or "linear".

    Raises:
        ValueError: ``by`` or ``shape`` has another value.
    """

    needs = ("blocks",)

    def __init__(
        self, by: Literal["angle", "cosine"] = "angle", shape: Literal["sigmoid", "linear"] = "sigmoid"
    ) -> None:
        if by not in ("angle", "cosine") or shape not in ("sigmoid", "linear"):
            raise ValueError(
                f"BlockProfile takes 'angle' or 'cosine', and 'sigmoid' or 'linear', got {by!r}, {shape!r}"
            )
        self.by, self.shape = by, shape

    def importance(self, statistics: Any) -> dict[str, float]:
        """Block -> its importance, from the ``statistics`` that ``needs`` names."""
        return {
            name: sums.angle / sums.count if self.by == "angle" else 1 - sums.cosine / sums.count
            for name, sums in statistics.blocks.items()
        }

    def of(self, task: Task) -> dict[str, float]:
        """The strength of every group, from its block's similarity.

        Raises:
            ValueError: the similarities are missing, for all blocks or for one.
        """
        if not task.importance:
            raise ValueError("BlockProfile needs the similarity of the blocks: statistics=['blocks', ...]")
        names = [group.name for group in task.scored()]
        values = torch.tensor(
            [found_for(name, task.importance, math.nan) for name in names], dtype=torch.float64, device="cpu"
        )
        if bool(values.isnan().any()):
            lost = names[int(values.isnan().nonzero()[0])]
            raise ValueError(
                f"{lost!r} is in none of the residual blocks that the allocation BlockProfile follows "
                f"({', '.join(task.importance)}); leave it out with ignored_layers, or pass allocation='global', "
                "'uniform' or a mapping of names to strengths"
            )
        if self.shape == "linear":
            return dict(zip(names, (1.1 - values / values.amax()).tolist(), strict=True))
        deviation = values.std(correction=0).clamp_min(1e-12)
        stays = torch.sigmoid(_STEEPNESS * (values - values.mean()) / deviation)
        return dict(zip(names, (1 / stays).tolist(), strict=True))


class TwoClasses:
    """Ranks attention and everything else separately; the rest loses ``gamma`` times what attention loses (NIRVANA).

    Args:
        gamma: budget of the rest divided by that of attention.

    Raises:
        ValueError: ``gamma`` is not positive.
    """

    def __init__(self, gamma: float = 3.36) -> None:
        if gamma <= 0:
            raise ValueError(f"gamma must be positive, got {gamma}")
        self.gamma = gamma

    def select(self, task: Task) -> dict[str, Tensor]:
        """The lowest units of attention and of the rest, each ranked among themselves."""
        attention = {group.name for group in task.scored() if group.kind in ("heads", "query_heads")}
        rest = {group.name for group in task.scored()} - attention
        if not attention or not rest:
            return Global().select(task)
        removed = _at_most(task, attention, task.budget / (1 + self.gamma))
        removed |= _at_most(task, rest, task.budget - _freed(task.costs, removed))
        missing = task.budget - _freed(task.costs, removed)
        if missing > 1e-9 * task.budget:  # the rest can free no more, so attention frees what is missing
            from_rest = {name: units for name, units in removed.items() if name in rest}
            wanted = task.budget - _freed(task.costs, from_rest)
            removed = from_rest | Global().select(_only(task, attention, wanted))
        return removed


def _at_most(task: Task, names: Collection[str], budget: float) -> dict[str, Tensor]:
    """Units of these groups that free the budget, or as much of it as possible."""
    try:
        return Global().select(_only(task, names, max(budget, 0.0)))
    except BudgetError as error:
        return Global().select(_only(task, names, error.reachable))


def _freed(costs: Costs, removed: Mapping[str, Tensor]) -> float:
    return costs.freed({name: len(units) for name, units in removed.items()})


def _only(task: Task, names: Collection[str], budget: float) -> Task:
    families = [family for family in task.families if set(family) <= set(names)]
    scores = {name: values for name, values in task.scores.items() if name in names}
    return replace(task, scores=scores, budget=budget, families=families, goal=None)
