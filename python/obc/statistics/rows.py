"""Rows of the Jacobian Criterion as a statistic, read by the scorer in the same run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import nn

from obc.model.arguments import one_of
from obc.model.groups import Side, Slices
from obc.scoring.coverage import Coverage
from obc.statistics.errors import StatisticsError
from obc.statistics.reader import Groups


@dataclass(frozen=True)
class Rows:
    """Rows r[n] = w . dL_n/dw of every channel (:class:`obc.JacobianScorer`). Needs a loss.

    Args:
        slices: with groups, "gate" reads their consumers, "all" every layer that they slice.
    """

    slices: Slices = "gate"

    name: ClassVar[str] = "rows"
    backward: ClassVar[bool] = True

    def wanted(self, model: nn.Module, groups: Groups) -> dict[str, set[Side]] | None:
        """The modules of ``model`` to read for ``groups``, with their sides; None reads both sides of all."""
        one_of("Rows(slices=...)", self.slices, get_args(Slices), StatisticsError)
        if groups is None:
            return None
        names = {name for name, _ in model.named_modules()}
        sides: dict[str, set[Side]] = {}
        for group in (one for one in groups if not one.is_depth):
            for part in group.gates if self.slices == "gate" else group.slices:
                if part.module in names:
                    sides.setdefault(part.module, set()).add(part.side)
        return sides

    def unread(self, model: nn.Module, groups: Groups) -> dict[str, Coverage]:
        """The parameters of ``model`` outside layers that read channels of ``groups``, with why they have no rows."""
        names = {name for name, _ in model.named_modules()}
        consumers = [part for group in groups or () for part in group.consumers if part.side == "in"]
        why = Coverage("unscored", "no layer is called for this weight; obc.prune reads its rows")
        return {part.module: why for part in consumers if part.module not in names}
