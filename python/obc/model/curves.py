"""Piecewise linear curves over the width of a group, such as measured seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


class Curve:
    """A value at a few widths, interpolated linearly between them, that never falls as the width grows.

    Below the smallest width the value is that at the smallest width. If values fall as the width grows, neighbours are
    replaced by their mean until none do (pool adjacent violators, the nearest such curve in least squares). Removing a
    unit thus never appears to cost time.

    Args:
        points: width -> value.

    Raises:
        ValueError: there are no points, a width is negative, or a value is negative or not finite.
    """

    def __init__(self, points: Mapping[int, float]) -> None:
        if not points:
            raise ValueError("a curve needs at least one point, width -> value")
        for width, value in points.items():
            if isinstance(width, bool) or not isinstance(width, int) or width < 0:
                raise ValueError(f"the widths of a curve must be integers from 0 on, got {width!r}")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"the values of a curve must be finite and not negative, got {value!r} at {width}")
        self.widths = tuple(sorted(points))
        self.values = tuple(_not_falling([float(points[width]) for width in self.widths]))

    @property
    def widest(self) -> int:
        """The largest width with a value."""
        return self.widths[-1]

    def at(self, width: int) -> float:
        """The value at a width.

        Raises:
            ValueError: the width is larger than the largest one.
        """
        if width > self.widest:
            raise ValueError(f"the curve ends at width {self.widest}, got {width}")
        return float(np.interp(width, self.widths, self.values))

    def scaled(self, factor: float) -> Curve:
        """The curve with all values multiplied by ``factor``."""
        return Curve({width: value * factor for width, value in zip(self.widths, self.values, strict=True)})

    def dense(self, size: int) -> Tensor:
        """(size + 1,) float64: the value at every width from 0 to ``size``."""
        self.at(size)  # refuses widths beyond the largest one
        return torch.from_numpy(np.interp(np.arange(size + 1), self.widths, self.values))

    def rates(self, size: int, lowest: int = 0) -> Tensor:
        """(size + 1,) float64: for each width w the largest saving per removed unit on the way to any smaller width v,

            max over v in [lowest, w) of (value(w) - value(v)) / (w - v),

        and 0 at widths up to ``lowest``. On a flat part this looks ahead to where the value falls.
        """
        values, widths = self.dense(size), torch.arange(size + 1, dtype=torch.float64, device="cpu")
        best = torch.zeros_like(values)
        for corner in {lowest, *(width for width in self.widths if lowest < width < size)}:
            if corner < size:
                rate = (values[corner + 1 :] - values[corner]) / (widths[corner + 1 :] - corner)
                best[corner + 1 :] = torch.maximum(best[corner + 1 :], rate)
        return best


def _not_falling(values: Sequence[float]) -> list[float]:
    """Pool adjacent violators."""
    pools: list[tuple[float, int]] = []  # (sum, how many)
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            (total, count), (other, more) = pools.pop(), pools.pop()
            pools.append((total + other, count + more))
    return [total / count for total, count in pools for _ in range(count)]
