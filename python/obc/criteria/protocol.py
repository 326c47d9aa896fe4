"""The interface of criteria: the statistics that one needs, and how it turns them into one score per unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from obc.criteria.subject import Subject
from obc.model.groups import ChannelGroup
from obc.statistics.names import Chosen
from obc.statistics.results import Statistics

GroupScores = dict[str, Tensor]
Needs = tuple["str | Chosen", ...]
ScoreFunction = Callable[[ChannelGroup, Statistics, nn.Module], "Tensor | None"]


class CriterionError(ValueError):
    """A criterion can't score this model on these batches; the message says why and what to do."""


@dataclass(frozen=True)
class About:
    """The entry of a criterion in the table of criteria.

    Attributes:
        system: the published system's name.
        source: where it was published.
        formula: S_u in one line.
        passes: what its statistics need: "weights", "forward", "gradients" (any loss, even one without labels) or
            "labels" (published with a loss on labels; any other loss works too).
        kinds: kinds of units that it can score.
        differs: what the published code does differently, and the option for that.
        missing: what is missing of the system, and why.
    """

    system: str
    source: str
    formula: str
    passes: Literal["weights", "forward", "gradients", "labels"]
    kinds: str = "channels, heads"
    differs: str = ""
    missing: str = ""


class Criterion:
    """A criterion: ``score(group, statistics, model)`` gives one number per unit, lowest for the least important.

    Any object with ``needs`` and ``score`` can be used; the other attributes are optional.

    Attributes:
        name: name in the registry.
        about: entry in the table of criteria.
        needs: names of statistics, or statistic objects; empty for criteria from weights alone.
        allocation: the published allocation: a name or object for ``obc.prune(allocation=...)``.
        update: the published update: a value of ``obc.prune(compensate=...)``.
        per_cost: whether scores may be divided by a unit's cost; False for ranks and standardised scores.
        reads_parameters: whether it reads weights for which no layer is called, too.
    """

    name: ClassVar[str] = ""
    about: ClassVar[About | None] = None
    needs: Needs = ()
    allocation: Any = None
    update: str | None = None
    per_cost: bool = True
    reads_parameters: ClassVar[bool] = False

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        """Scores of one group.

        Args:
            group: its ``slices`` are what goes with each unit, its ``consumers`` those of the layers that read it.
            statistics: what :attr:`needs` names, such as ``statistics.moments[layer]``.
            model: the present model, to be read, not changed.

        Returns:
            (units,) of any floating dtype, finite, the least important unit the lowest; None if the criterion can't
            score this group, which then keeps its width.
        """
        raise NotImplementedError

    def finish(self, scores: GroupScores, statistics: Statistics, model: nn.Module) -> GroupScores:
        """Adjust the scores of all groups together, once every group has its own.

        Args:
            scores: of every group that :meth:`score` could score.
            statistics: as for :meth:`score`.
            model: the present model.

        Returns:
            The scores to use; by default the same.
        """
        return scores


class MeasuredCriterion(Criterion):
    """A criterion that runs the model itself and scores all groups at once."""

    def measure(self, subject: Subject) -> GroupScores:
        """Scores of every group that the criterion can score.

        Args:
            subject: the model with its groups, batches, loss and ``forward_fn``; restore what you change in it.
        """
        raise NotImplementedError

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        """Raises TypeError: there is nothing to score from statistics alone."""
        raise TypeError(f"{self.name!r} runs the model itself: pass it to obc.prune, or call measure(subject)")


class MeasuredRows(MeasuredCriterion):
    """A measured criterion of rows: S_u = sum over n of r_u[n]^2; ``selection="joint"`` chooses sets by r."""

    def measure_rows(self, subject: Subject) -> dict[str, Tensor]:
        """(N, units) rows r of every group that has some; ``subject`` as for :meth:`MeasuredCriterion.measure`."""
        raise NotImplementedError

    def measure(self, subject: Subject) -> GroupScores:
        """(units,) per group: sum over n of r_u[n]^2."""
        return {name: rows.double().square().sum(0) for name, rows in self.measure_rows(subject).items()}


class FromFunction(Criterion):
    """A function (group, statistics, model) -> (units,) as a criterion; ``function.needs`` names its statistics."""

    def __init__(self, function: ScoreFunction) -> None:
        self.function, self.needs = function, tuple(getattr(function, "needs", ()))

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        """The function's result."""
        return self.function(group, statistics, model)


def name_of(criterion: Any) -> str:
    """The criterion's name in messages."""
    function = getattr(criterion, "function", None)
    return getattr(criterion, "name", "") or getattr(function, "__name__", type(criterion).__name__)
