"""Checks the arguments of ``obc.prune``: choices by name, caps, batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from obc.criteria import Jacobian, get
from obc.criteria.protocol import name_of
from obc.model.arguments import iterable_batches, no_batches, one_of, positive
from obc.model.groups import Slices
from obc.pruning.report import PruningResult
from obc.selection.allocation import Allocation
from obc.selection.allocations import allocation_of
from obc.selection.caps import Caps
from obc.selection.choice import Selection
from obc.structures.protocol import Limits, Structure

Compensation = Literal["mean", "fusion", "correct", "ls", "seq"]


@dataclass(frozen=True)
class Choice:
    """How units are chosen.

    Attributes:
        slices: which slices of a unit the Jacobian Criterion reads.
        per_cost: whether scores are divided by what the unit's removal frees.
        caps: how much any one group may lose.
        open: nothing was asked for, so that :mod:`obc.pruning.trial` may take another criterion.
    """

    criterion: Any
    allocation: Allocation
    selection: Selection
    slices: Slices
    per_cost: bool
    shrinkage: float | None
    min_units: int
    round_to: int | None
    caps: Caps
    open: bool = False

    @classmethod
    def of(
        cls,
        criterion: Any,
        allocation: Any,
        selection: Selection | None,
        slices: Slices,
        per_macs: bool | None,
        shrinkage: float | None,
        min_units: int,
        round_to: int | None,
        caps: Caps,
    ) -> Choice:
        """Check the arguments of ``obc.prune``; missing ones default to the criterion's published choice.

        Raises:
            ValueError: an argument has an unknown value, or arguments can't be combined.
        """
        is_open = criterion is allocation is selection is shrinkage is None and slices == "gate"
        criterion, slices = chosen_criterion("jacobian" if criterion is None else criterion, slices)
        if selection is None:
            selection = "joint" if has_rows(criterion) and slices == "gate" else "independent"
        one_of("selection", selection, get_args(Selection))
        one_of("slices", slices, get_args(Slices))
        _check_joint(criterion, selection, slices)
        per_cost = getattr(criterion, "per_cost", True) if per_macs is None else per_macs
        positive("min_units", min_units)
        if round_to is not None:
            positive("round_to", round_to)
        chosen = chosen_allocation(allocation, criterion)
        return cls(criterion, chosen, selection, slices, per_cost, shrinkage, min_units, round_to, caps, is_open)

    def said(self, allocation: Any) -> dict[str, object]:
        """The entries for the report's provenance; ``allocation`` is the argument of ``obc.prune``."""
        return {
            "criterion": name_of(self.criterion),
            "allocation": allocation if isinstance(allocation, str) else type(self.allocation).__name__,
            "selection": self.selection,
            "slices": self.slices,
            "per_macs": self.per_cost,
        }

    @property
    def narrowing(self) -> list[str]:
        """The arguments, as the caller gave them, that keep groups wider than a single unit."""
        given: dict[str, object] = {"round_to": self.round_to or 1, "min_units": self.min_units}
        given |= {"max_pruning_ratio": self.caps.ratio, "protected_blocks": self.caps.protected}
        return [f"{name}={value}" for name, value in given.items() if value not in (1, (0, 0))]

    def limits(self, structure: Structure, least: Mapping[str, int]) -> Limits:
        """The structure's limits joined with ``min_units``, ``round_to`` and the caps."""
        own: Limits = getattr(structure, "limits", Limits())
        kept, multiples = {}, {}
        for group in structure.groups:
            name, own_least = group.name, own.min_units.get(group.name, 1)
            # If all units of a group may be removed, some of its channels always stay; they count as one unit.
            asked = 0 if group.is_depth else self.min_units - (not own_least)
            kept[name] = max(asked, own_least, least.get(name, 0))
            multiples[name] = own.multiple(name, self.round_to)
        return replace(own, min_units=kept, round_to=multiples)


@dataclass(frozen=True)
class Options:
    """How a call of ``obc.prune`` runs: its arguments of these names, checked."""

    steps: int | Sequence[float]
    recalibrate: bool = False
    compensate: Compensation | None = None
    compensate_every_step: bool = False
    verify: bool = False
    measure: bool = False
    on_step: Callable[[PruningResult], None] | None = None
    progress: bool | None = None

    def said(self) -> dict[str, object]:
        """The entries for the report's provenance."""
        every = " after every step" if self.compensate_every_step else ""
        return {"compensate": self.compensate and f"{self.compensate}{every}"}


def _check_joint(criterion: Any, selection: Selection, slices: Slices) -> None:
    if selection == "joint" and not has_rows(criterion):
        raise ValueError(
            f"selection='joint' needs rows, which criterion={name_of(criterion)!r} does not have; leave selection out, "
            "or pass criterion='jacobian'"
        )
    if selection == "joint" and slices != "gate":
        raise ValueError("selection='joint' works on one row per unit; pass slices='gate', or selection='independent'")


def has_rows(criterion: Any) -> bool:
    """Whether the criterion has rows, so that sets of units can be chosen."""
    return isinstance(criterion, Jacobian) or hasattr(criterion, "measure_rows")


def chosen_criterion(criterion: Any, slices: Slices) -> tuple[Any, Slices]:
    """The criterion, and the slices that the Jacobian Criterion reads; a criterion object has its own."""
    found = get(criterion)
    if isinstance(found, Jacobian):
        if isinstance(criterion, str):
            found = Jacobian(slices if slices in get_args(Slices) else "gate")
        else:
            slices = found.slices
    return found, slices


def chosen_allocation(allocation: Any, criterion: Any) -> Allocation:
    """``allocation``; by default the one the criterion was published with, or else all units compete."""
    if allocation is None:
        allocation = getattr(criterion, "allocation", None) or "global"
    return allocation_of(allocation)


def chosen_compensation(
    compensate: Compensation | bool | None, every_step: bool | None
) -> tuple[Compensation | None, bool]:
    """``compensate``, with True replaced by "correct", and whether it is repeated after every step.

    Raises:
        ValueError: it is unknown, or can't be repeated after every step.
    """
    if isinstance(compensate, bool):
        compensate = "correct" if compensate else None
    one_of("compensate", compensate, (None, *get_args(Compensation)))
    if every_step and compensate in (None, "mean", "fusion"):
        raise ValueError(
            f"compensate_every_step=True is for compensate='correct', 'ls' and 'seq', got compensate={compensate!r}"
        )
    if every_step is None:
        every_step = compensate == "correct"
    return compensate, every_step


def repeatable(batches: Iterable[Any] | None) -> Sequence[Any]:
    """``batches`` as a list, because every pass must see the same ones and a shuffling data loader does not ensure
    that.

    Results of one pass are compared with those of later passes by the batch's number.

    Raises:
        ValueError: they are missing, empty, or not iterable.
    """
    if batches is None:
        raise ValueError("batches is missing: pass obc.prune(model, example_inputs, batches, loss_fn), or by keyword")
    if callable(batches) and not hasattr(batches, "__iter__"):
        raise ValueError(
            f"batches must be an iterable, got {type(batches).__name__}; without example_inputs pass the rest by "
            "keyword: obc.prune(model, batches=..., loss_fn=...)"
        )
    iterable_batches(batches)
    found = batches if isinstance(batches, (list, tuple)) else list(batches)
    if len(found) == 0:
        raise ValueError(no_batches("score"))
    return found
