"""Effective widths of groups whose cost is not proportional to their width, as tables on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from obc.model.curves import Curve


class EffectiveWidths:
    """Effective widths of G groups (:class:`obc.model.costs.Costs`) at every width, and the rates at which they fall.

    Args:
        curves: index of a group -> its curve; for other groups the effective width is the width.
        sizes: number of units of each group.
        lowest: lowest permitted width of each group.
    """

    def __init__(
        self, curves: Mapping[int, Curve], sizes: Sequence[int], lowest: Sequence[int], device: torch.device
    ) -> None:
        values, rates = [], []
        for group, (size, least) in enumerate(zip(sizes, lowest, strict=True)):
            curve = curves.get(group) or Curve({0: 0.0, size: float(size)})
            values.append(curve.dense(size))
            rates.append(curve.rates(size, least))
        first = torch.tensor([0, *(size + 1 for size in sizes[:-1])], device="cpu").cumsum(0)
        self._first = first.to(device)
        self._values, self._rates = (torch.cat(parts).to(device) for parts in (values, rates))

    def at(self, widths: Tensor) -> Tensor:
        """(G,) effective widths at ``widths`` (G,), which count from 0."""
        return self._values.index_select(0, self._first + widths.long())

    def taken(self, widths: Tensor, units: Tensor) -> Tensor:
        """(G,) decrease of the effective widths when every group loses so many units; too many count as all."""
        return self.at(widths) - self.at((widths - units).clamp_min(0))

    def promised(self, widths: Tensor, units: Tensor) -> Tensor:
        """(G,) decrease for so many units at the best rate on the way to any smaller width.

        On a flat part of a curve a unit frees nothing; this credits it with its share of the next fall.
        """
        return self._rates.index_select(0, self._first + widths.long()) * units
