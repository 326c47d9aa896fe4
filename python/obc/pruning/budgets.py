"""Budgets: the share of MACs, parameters, memory or time that must remain, and how these are counted."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from obc.model.arguments import instance, number, positive, several
from obc.model.costs import Costs
from obc.model.evaluation import Run
from obc.model.latency_table import LatencyTable
from obc.pruning.report import Counted
from obc.structures.latency import measure_latency
from obc.structures.memory import MemoryUse
from obc.structures.protocol import Structure

_DEFAULT_SHARE = 0.5
DEFAULT_STEPS = 8

Argument = Literal["macs", "params", "blocks", "active_params", "memory", "latency"]
# Argument -> the name in messages of what is counted, and its unit in costs and reports.
COUNTED: Mapping[Argument, tuple[str, Counted]] = {
    "macs": ("MACs", "macs"),
    "params": ("parameters", "parameters"),
    "blocks": ("prunable parameters", "parameters"),
    "active_params": ("active parameters", "active_parameters"),
    "memory": ("bytes of memory", "bytes"),
    "latency": ("seconds of latency", "seconds"),
}


@dataclass(frozen=True)
class Meters:
    """How memory and latency are counted.

    Attributes:
        memory_use: the memory to count.
        table: seconds of every group; None if latency is not known.
    """

    memory_use: MemoryUse = field(default_factory=MemoryUse)
    table: LatencyTable | None = None

    @classmethod
    def of(cls, memory_use: MemoryUse | None, table: LatencyTable | str | os.PathLike[str] | None) -> Meters:
        """Convert the arguments of ``obc.prune``; a table may be a path.

        Raises:
            LatencyTableError: the file is not a latency table.
        """
        if table is not None and not isinstance(table, LatencyTable):
            instance("latency_table", table, (str, os.PathLike), "an obc.LatencyTable or the path of one")
            table = LatencyTable.load(table)
        instance("memory_use", memory_use, (MemoryUse, type(None)), "an obc.MemoryUse")
        return cls(memory_use or MemoryUse(), table)

    def costs(self, structure: Structure, argument: Argument) -> Costs:
        """The present cost of a structure's model.

        Raises:
            ValueError: the structure does not provide it, or the latency table lacks a group.
        """
        if argument == "memory":
            if (memory := getattr(structure, "memory", None)) is None:
                raise ValueError(f"memory can't be counted: {type(structure).__name__} has no memory(use)")
            found: Costs = memory(self.memory_use)
            return found
        if argument == "latency":
            if self.table is None:
                raise ValueError(
                    "a latency table is missing: pass latency_table=, for example from obc.measure_latency"
                )
            return self.table.costs(structure.groups, structure.costs("parameters").inside)
        return structure.costs(COUNTED[argument][1])  # type: ignore[arg-type]

    def measured(self, structure: Any, run: Run, round_to: int | None) -> Meters:
        """The same with a latency table, measured now if there is none.

        Raises:
            ValueError: the structure's groups can't be tried on copies.
        """
        if self.table is not None:
            return self
        if not hasattr(structure, "twin"):
            raise ValueError(
                f"latency can't be measured: {type(structure).__name__} has no twin(model) for trying narrower widths; "
                "pass latency_table="
            )
        return replace(self, table=measure_latency(structure, run, round_to=round_to))

    def known(self, structure: Structure) -> dict[str, tuple[float, str]]:
        """Further known quantities of a model besides MACs and parameters: name -> (amount, what is counted)."""
        parameters = structure.costs("parameters")
        found = {"blocks": (parameters.total() - parameters.constant, "parameters of what can be pruned")}
        active = _active(structure)
        if active is not None and active != parameters.total():
            found["active_params"] = (active, "parameters that one token meets")
        if hasattr(structure, "memory"):
            found["memory"] = (self.costs(structure, "memory").total(), f"bytes: {self.memory_use}")
        if self.table is not None:
            found["latency"] = (self.costs(structure, "latency").total(), f"seconds: {self.table}")
        return found


def _active(structure: Structure) -> float | None:
    try:
        return structure.costs("active_parameters").total()
    except ValueError:  # unknown for this structure
        return None


@dataclass(frozen=True)
class Budget:
    """The part of the unpruned model that must remain.

    Attributes:
        argument: the argument of ``obc.prune`` that says what is counted.
        share: the share in (0, 1]; for an ``amount``, None until :meth:`resolved`.
        amount: bytes of memory that must remain.
        meters: how memory and latency are counted.
    """

    argument: Argument
    share: float | None
    amount: float | None = None
    meters: Meters = field(default_factory=Meters)

    @classmethod
    def of(cls, given: Mapping[Argument, float | None], meters: Meters | None = None) -> Budget:
        """The budget that is not None; half of the MACs if all are.

        Raises:
            ValueError: several budgets are given, or the share is outside (0, 1].
        """
        shares = {name: share for name, share in given.items() if share is not None}
        if len(shares) > 1:
            said = " and ".join(f"{name}={share}" for name, share in shares.items())
            count = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}[len(shares)]
            raise ValueError(f"{said} are {count} budgets; pass the one that is to be met")
        name, value = next(iter(shares.items()), ("macs", _DEFAULT_SHARE))
        number(name, value)
        meters = meters or Meters()
        if name == "memory" and value > 1 and math.isfinite(value):
            return cls(name, None, value, meters)
        if not 0 < value <= 1:
            more = ", or a number of bytes above 1" if name == "memory" else ""
            raise ValueError(f"{name} is the share that remains, in (0, 1]{more}, got {value}")
        return cls(name, value, None, meters)

    @property
    def noun(self) -> str:
        """The name of the counted quantity in messages."""
        return COUNTED[self.argument][0]

    @property
    def unit(self) -> Counted:
        """The name of the counted quantity in reports."""
        return COUNTED[self.argument][1]

    @property
    def said(self) -> str:
        """The budget, written as an argument of ``obc.prune``."""
        return f"{self.argument}={self.share if self.amount is None else self.amount:g}"

    def described(self, share: float) -> str:
        """A share in the unit in which the budget was given: bytes for an amount."""
        if self.amount is None or not self.share:
            return f"{share:.4f}"
        return f"{share * self.amount / self.share:.0f} bytes"

    def costs(self, structure: Structure) -> Costs:
        """The costs that the budget counts, for the structure's present model."""
        return self.meters.costs(structure, self.argument)

    def counted(self, costs: Costs, widths: Tensor | None = None) -> float:
        """The part of the costs that the share refers to, at ``widths`` or at present."""
        return costs.total(widths) - (costs.constant if self.argument == "blocks" else 0.0)

    def ready(self, structure: Structure, run: Run, round_to: int | None) -> Budget:
        """The same, with latency measured if needed and not given, and an amount converted to a share.

        Raises:
            ValueError: the latency table belongs to another model or device, or the amount exceeds the model's.
        """
        budget = self
        if self.argument == "latency":
            budget = replace(self, meters=self.meters.measured(structure, run, round_to))
        if budget.meters.table is not None:
            budget.meters.table.check_device(structure.model)
        return budget.resolved(structure)

    def resolved(self, structure: Structure) -> Budget:
        """The same, with an amount converted to its share of the unpruned model.

        Raises:
            ValueError: the amount exceeds the model's.
        """
        if self.amount is None:
            return self
        full = self.counted(self.costs(structure))
        if self.amount > full:
            raise ValueError(
                f"memory={self.amount:g} bytes is more than the {full:g} that the unpruned model takes "
                f"({self.meters.memory_use})"
            )
        return replace(self, share=self.amount / full)

    def count_steps(self, steps: int | Sequence[float]) -> int:
        """The number of steps.

        Raises:
            ValueError: the number of steps is below 1, or the shares do not descend to the budget's.
        """
        if isinstance(steps, (int, numbers.Number, str)):
            positive("steps", steps)
            return int(steps)  # type: ignore[arg-type]
        several("steps", steps)
        for share in steps:
            number("a share in steps", share)
        shares = [float(share) for share in steps]
        if self.share is None:
            raise ValueError(f"with {self.said} bytes, steps is a number of steps, got {shares}")
        if not shares or shares[-1] != self.share or shares != sorted(set(shares), reverse=True) or shares[0] > 1:
            raise ValueError(f"steps must be shares of {self.noun} that descend to {self.said}, got {shares}")
        return len(shares)

    def schedule(self, steps: int | Sequence[float], units: int) -> list[float]:
        """The share that remains after every step; the budget is ready.

        Args:
            steps: their number, or the shares.
            units: how many units there are; a step that chooses removes at least one.

        Raises:
            ValueError: there are more steps than units, and than by default; or as in :meth:`count_steps`.
        """
        count = self.count_steps(steps)
        if count > max(units, DEFAULT_STEPS):
            raise ValueError(
                f"{count} steps were asked for, but there are {units} units to remove, and a step removes at least "
                f"one; pass steps={min(units, DEFAULT_STEPS)}, or at most {max(units, DEFAULT_STEPS)}"
            )
        if not isinstance(steps, (int, numbers.Integral)):
            return [float(share) for share in steps]
        assert self.share is not None
        return [self.share ** (step / count) for step in range(1, count + 1)]
