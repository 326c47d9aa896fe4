"""Effective widths of groups whose cost is not proportional to their width, as tables on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from obc.model.curves import Curve


class EffectiveWidths:
    """Of G groups the effective width (:class:`obc.model.costs.Costs`) at every width, and the rate at which it falls.

    Args:
        curves: index of a group -> its curve; the effective width of the others is their width.
        sizes: units of each group.
        lowest: widths that the groups can fall to.
        device: of the tables.
    """

    def __init__(
        self, curves: Mapping[int, Curve], sizes: Sequence[int], lowest: Sequence[int], device: torch.device
    ) -> None:
        values, rates = [], []
        for group, (size, least) in enumerate(zip(sizes, lowest, strict=True)):
            curve = curves.get(group) or Curve({0: 0.0, size: float(size)})
            values.append(curve.dense(size))
            rates.append(curve.rates(size, least))
        first = torch.tensor([0, *(size + 1 for size in sizes[:-1])]).cumsum(0)
        self._first = first.to(device)
        self._values, self._rates = (torch.cat(parts).to(device) for parts in (values, rates))

    def at(self, widths: Tensor) -> Tensor:
        """(G,) at widths (G,), which count from 0."""
        return self._values.index_select(0, self._first + widths.long())

    def taken(self, widths: Tensor, units: Tensor) -> Tensor:
        """(G,) what the effective widths lose with so many units of every group; too many count as all."""
        return self.at(widths) - self.at((widths - units).clamp_min(0))

    def promised(self, widths: Tensor, units: Tensor) -> Tensor:
        """(G,) what they lose with so many units at the best rate on the way to any smaller width.

        On a flat part of a curve a unit frees nothing; this is the share of a unit in what the next fall frees.
        """
        return self._rates.index_select(0, self._first + widths.long()) * units
