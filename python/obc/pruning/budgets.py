"""What is to remain of a model: of its MACs, parameters, memory or time, and how much of each there is."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from obc.model.costs import Costs
from obc.model.latency_table import LatencyTable
from obc.pruning.report import Counted
from obc.structures.latency import measure_latency
from obc.structures.memory import MemoryUse
from obc.structures.protocol import Structure

_DEFAULT_SHARE = 0.5

Argument = Literal["macs", "params", "blocks", "active_params", "memory", "latency"]
# As messages call what is counted, and its unit in costs.
NOUNS: Mapping[Argument, str] = {
    "macs": "MACs",
    "params": "parameters",
    "blocks": "prunable parameters",
    "active_params": "active parameters",
    "memory": "bytes of memory",
    "latency": "seconds of latency",
}


@dataclass(frozen=True)
class Meters:
    """How memory and latency are counted.

    Attributes:
        memory_use: what memory is counted.
        table: seconds of every group; None: latency is not known.
    """

    memory_use: MemoryUse = field(default_factory=MemoryUse)
    table: LatencyTable | None = None

    @classmethod
    def of(cls, memory_use: MemoryUse | None, table: LatencyTable | str | os.PathLike[str] | None) -> Meters:
        """What ``obc.prune`` was given; a table may be the path of one.

        Raises:
            LatencyTableError: the file is no latency table.
        """
        if table is not None and not isinstance(table, LatencyTable):
            table = LatencyTable.load(table)
        return cls(memory_use or MemoryUse(), table)

    def costs(self, structure: Structure, argument: Argument) -> Costs:
        """What the model of a structure costs now.

        Raises:
            ValueError: the structure does not say it, or the latency table lacks a group.
        """
        if argument == "memory":
            if (memory := getattr(structure, "memory", None)) is None:
                raise ValueError(f"a {type(structure).__name__} does not say its memory: it has no memory(use)")
            found: Costs = memory(self.memory_use)
            return found
        if argument == "latency":
            if self.table is None:
                raise ValueError("there is no latency table: pass latency_table=, or measure one, obc.measure_latency")
            return self.table.costs(structure.groups, structure.costs("parameters").inside)
        if argument == "macs":
            return structure.costs("macs")
        return structure.costs("active_parameters" if argument == "active_params" else "parameters")

    def measured(self, structure: Any, run: Callable[[nn.Module], Any], round_to: int | None) -> Meters:
        """The same with a latency table, measured now where there is none.

        Raises:
            ValueError: the structure's groups can't be tried on copies.
        """
        if self.table is not None:
            return self
        if not hasattr(structure, "twin"):
            raise ValueError(
                f"latency can't be measured: a {type(structure).__name__} has no twin(model) to try narrower widths "
                "on; pass latency_table="
            )
        return replace(self, table=measure_latency(structure, run, round_to=round_to))

    def known(self, structure: Structure) -> dict[str, tuple[float, str]]:
        """Whatever else than MACs and parameters is known of a model: name -> (how much, of what)."""
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
    except ValueError:  # not known of this structure
        return None


@dataclass(frozen=True)
class Budget:
    """What is to remain of the unpruned model.

    Attributes:
        argument: of ``obc.prune``: what is counted.
        share: of it, in (0, 1]; None until :meth:`resolved` where an amount is given.
        amount: bytes of memory that are to remain.
        meters: how memory and latency are counted.
    """

    argument: Argument
    share: float | None
    amount: float | None = None
    meters: Meters = field(default_factory=Meters)

    @classmethod
    def of(cls, given: Mapping[Argument, float | None], meters: Meters | None = None) -> Budget:
        """The one that is not None; half of the MACs where all are.

        Raises:
            ValueError: several are given, or the share does not lie in (0, 1].
        """
        shares = {name: share for name, share in given.items() if share is not None}
        if len(shares) > 1:
            said = " and ".join(f"{name}={share:g}" for name, share in shares.items())
            count = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}[len(shares)]
            raise ValueError(f"{said} are {count} budgets; pass the one that is to be met")
        name, value = next(iter(shares.items()), ("macs", _DEFAULT_SHARE))
        meters = meters or Meters()
        if name == "memory" and value > 1 and math.isfinite(value):
            return cls(name, None, value, meters)
        if not 0 < value <= 1:
            more = ", or a number of bytes above 1" if name == "memory" else ""
            raise ValueError(f"{name} is the share that remains, in (0, 1]{more}, got {value}")
        return cls(name, value, None, meters)

    @property
    def noun(self) -> str:
        """As messages call it."""
        return NOUNS[self.argument]

    @property
    def unit(self) -> Counted:
        """Of its costs."""
        units: dict[Argument, Counted] = {
            "macs": "macs",
            "active_params": "active_parameters",
            "memory": "bytes",
            "latency": "seconds",
        }
        return units.get(self.argument, "parameters")

    @property
    def said(self) -> str:
        """As ``obc.prune`` was given it."""
        return f"{self.argument}={self.share if self.amount is None else self.amount:g}"

    def costs(self, structure: Structure) -> Costs:
        """What the budget counts, of the model of a structure as it is now."""
        return self.meters.costs(structure, self.argument)

    def counted(self, costs: Costs, widths: Tensor | None = None) -> float:
        """What of the costs, at ``widths`` or as the model is now, the share is of."""
        return costs.total(widths) - (costs.constant if self.argument == "blocks" else 0.0)

    def ready(self, structure: Structure, run: Callable[[nn.Module], Any], round_to: int | None) -> Budget:
        """The same, latency measured where it is asked for and no table is given, and an amount made a share.

        Raises:
            ValueError: the latency table is not of this model or device, or the amount is more than there is.
        """
        budget = self
        if self.argument == "latency":
            budget = replace(self, meters=self.meters.measured(structure, run, round_to))
        if budget.meters.table is not None:
            budget.meters.table.check_device(structure.model)
        return budget.resolved(structure)

    def resolved(self, structure: Structure) -> Budget:
        """The same with the share that an amount is of the unpruned model.

        Raises:
            ValueError: the amount is more than there is.
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

    def schedule(self, steps: int | Sequence[float]) -> list[float]:
        """The share that remains after every step; without a share, checks the steps alone.

        Raises:
            ValueError: a number of steps below 1, or shares that do not descend to the budget's.
        """
        if isinstance(steps, int):
            if isinstance(steps, bool) or steps < 1:
                raise ValueError(f"steps must be a positive integer, got {steps!r}")
            share = _DEFAULT_SHARE if self.share is None else self.share
            return [share ** (step / steps) for step in range(1, steps + 1)]
        shares = [float(share) for share in steps]
        if self.share is None:
            raise ValueError(f"with {self.said} bytes, steps is a number of steps, got {shares}")
        if not shares or shares[-1] != self.share or shares != sorted(set(shares), reverse=True) or shares[0] > 1:
            raise ValueError(f"steps must be shares of {self.noun} that descend to {self.said}, got {shares}")
        return shares
