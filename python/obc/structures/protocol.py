"""The interface between ``obc.prune`` and the ways to find and slice coupled channels."""

from __future__ import annotations

import math
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
    """Constraints on the widths of a structure's groups, in addition to those of ``obc.prune``'s caller.

    Attributes:
        min_units: group -> the number of units that must stay, 1 by default; 0 if other channels always stay.
        round_to: group -> a number of which its width must be a multiple.
        whole: groups whose units are not channels, such as heads; the caller's rounding does not apply to them.
        families: names of groups that keep equal widths; empty if every width is free.
        widths: group of a family -> the only permitted widths; any if not named.
    """

    min_units: Mapping[str, int] = field(default_factory=dict)
    round_to: Mapping[str, int] = field(default_factory=dict)
    whole: Collection[str] = ()
    families: Sequence[Sequence[str]] = ()
    widths: Mapping[str, Collection[int]] = field(default_factory=dict)

    def multiple(self, group: str, round_to: int | None) -> int:
        """The number of which a group's width must be a multiple, if the caller rounds widths to ``round_to``."""
        asked = 1 if round_to is None or group in self.whole else round_to
        return math.lcm(asked, self.round_to.get(group, 1))


class Structure(Protocol):
    """A model's prunable groups, found on Torch-Pruning's dependency graph or, for transformers, without it.

    A structure may also have attributes ``limits`` (:class:`Limits`), ``left_out`` (name -> why it can't be pruned) and
    ``warnings`` (what the caller should know about the present model).

    Attributes:
        model: the model, pruned in place.
    """

    model: nn.Module

    @property
    def plan(self) -> PruningPlan:
        """Everything removed so far, in terms of the unpruned model."""

    @property
    def groups(self) -> Sequence[ChannelGroup]:
        """The present model's groups; names stay the same from step to step."""

    def costs(self, unit: Unit) -> Costs:
        """Costs of the present model in a ``unit`` such as "macs" or "parameters", as a function of its groups."""

    def remove(self, units: Mapping[str, Tensor]) -> None:
        """Remove these units (int64 indices into each present named group), and record it in the plan."""


class Provable(Structure, Protocol):
    """A structure whose groups can be tried on copies of its model by :func:`obc.structures.proof.prove`."""

    def twin(self, model: nn.Module) -> Structure:
        """The same groups on ``model``, a copy of this structure's present model, with a plan that begins there.

        Removals from the twin don't change this structure.
        """

    def leave_out(self, name: str, reason: str) -> None:
        """Remove the group ``name`` from ``groups``, and record the reason in ``left_out``."""
