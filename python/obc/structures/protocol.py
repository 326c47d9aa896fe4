"""The interface between ``obc.prune`` and the ways to find and slice coupled channels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor, nn

from obc.model.costs import Costs
from obc.model.groups import ChannelGroup
from obc.model.plan import PruningPlan

Unit = Literal["macs", "parameters", "active_parameters"]


@dataclass(frozen=True)
class Limits:
    """What the widths of a structure's groups must be, besides what the caller of ``obc.prune`` asks for.

    Attributes:
        min_units: by group, how many units stay at least, 1 by default; 0 where other channels always stay.
        round_to: by group, a multiple of which stays.
        whole: groups whose units are no channels, such as heads: what the caller says about rounding spares them.
        families: names of groups that keep equal widths; empty where every width is free.
        widths: by group of a family, the only widths that it may come to; any where it is not named.
    """

    min_units: Mapping[str, int] = field(default_factory=dict)
    round_to: Mapping[str, int] = field(default_factory=dict)
    whole: Collection[str] = ()
    families: Sequence[Sequence[str]] = ()
    widths: Mapping[str, Collection[int]] = field(default_factory=dict)


class Structure(Protocol):
    """A model's prunable groups. Implemented on Torch-Pruning's dependency graph, and for transformers without it.

    A structure may have attributes ``limits`` (:class:`Limits`), ``left_out`` (name -> why it can't be pruned) and
    ``warnings`` (what the caller should know about the model as it is now) too.

    Attributes:
        model: the model, pruned in place.
        plan: everything removed so far, in terms of the unpruned model.
        groups: of the model as it is now; names stay the same from step to step.
    """

    model: nn.Module

    @property
    def plan(self) -> PruningPlan: ...

    @property
    def groups(self) -> Sequence[ChannelGroup]: ...

    def costs(self, unit: Unit) -> Costs:
        """Costs of the model as it is now, over its groups."""

    def remove(self, units: Mapping[str, Tensor]) -> None:
        """Remove these units (int64 indices into each named group as it is now), and record it in the plan."""


class Provable(Structure, Protocol):
    """A structure whose groups can be tried on copies of its model: :func:`obc.structures.proof.prove` does."""

    def twin(self, model: nn.Module) -> Structure:
        """The same groups on ``model``, a copy of this structure's own as it is now, with a plan that begins there.

        What is removed from the twin changes nothing here.
        """

    def leave_out(self, name: str, reason: str) -> None:
        """Take a group out of ``groups``, and note the reason in ``left_out``."""
