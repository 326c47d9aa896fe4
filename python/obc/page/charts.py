"""Charts without scripts: HTML bars, which stay readable on a phone, and SVG curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from obc.page.markup import Html, element, number, safe

_CURVE_WIDTH, _CURVE_HEIGHT = 240, 90
_MARGIN = 2
_POSITIVE = 0.92  # of the height; the rest separates values that are not positive


def bar(after: float, before: float = 1.0) -> Html:
    """A bar of length ``before`` with ``after`` of it filled, both in [0, 1]."""
    whole, filled = (min(max(value, 0.0), 1.0) for value in (before, after))
    inner = element("span", class_="obc-after", style=f"width:{100 * filled / whole if whole else 0:.1f}%")
    return element("span", inner, class_="obc-before", style=f"width:{100 * whole:.1f}%", aria_hidden="true")


def change(before: float, after: float, longest: float | None = None) -> list[object]:
    """The cells of a change: a bar, as long as ``before`` is of the longest, both numbers, and the remaining share."""
    whole = longest or before or 1
    share = f"{after / before:.1%}" if before else "-"
    return [bar(after / whole, before / whole), f"{number(before)} → {number(after)}", share]


def quantiles(values: Tensor, most: int) -> list[float]:
    """The finite values, ascending; of more than ``most`` so many quantiles."""
    ordered = values.detach().double().flatten().cpu()
    ordered = ordered[ordered.isfinite()].sort().values
    if len(ordered) > most:
        ordered = ordered[torch.linspace(0, len(ordered) - 1, most, device="cpu").round().long()]
    return ordered.tolist()


def exponents(values: Iterable[float]) -> tuple[float, float]:
    """Lowest and highest exponent of ten of the positive values."""
    found = [math.log10(value) for value in values if value > 0]
    low, high = min(found, default=0.0), max(found, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def height(value: float, low: float, high: float, whole: float) -> float:
    """The vertical position of a value from the top, on a logarithmic axis; others lie at the bottom."""
    if value <= 0:
        return whole - _MARGIN
    share = (math.log10(value) - low) / (high - low)
    return round(_MARGIN + (1 - share) * (_POSITIVE * whole - _MARGIN), 1)


def curves(values: Mapping[str, Sequence[float]], *, mark: float | None = None) -> tuple[Html, str]:
    """(picture, its range): one curve per list, on a common logarithmic axis.

    Args:
        values: class of a line -> its values, from left to right.
        mark: share of the width, in [0, 1], at which to draw a line.
    """
    low, high = exponents(value for line in values.values() for value in line)
    lines = []
    for side, line in values.items():
        step = _CURVE_WIDTH / max(1, len(line) - 1)
        points = [f"{round(i * step, 1)},{height(v, low, high, _CURVE_HEIGHT)}" for i, v in enumerate(line)]
        if len(points) == 1:
            points.append(f"{_CURVE_WIDTH},{points[0].split(',')[1]}")
        if points:
            lines.append(element("polyline", points=" ".join(points), class_=f"line {side}"))
    if mark is not None:
        x = round(min(max(mark, 0.0), 1.0) * _CURVE_WIDTH, 1)
        lines.append(element("line", x1=x, x2=x, y1=0, y2=_CURVE_HEIGHT, class_="mark"))
    bounds = f"{10**low:.0e} to {10**high:.0e}"
    return element("svg", *lines, viewBox=f"0 0 {_CURVE_WIDTH} {_CURVE_HEIGHT}", role="img", aria_label=bounds), bounds


def figure(picture: Html, *caption: object) -> Html:
    """A picture with its caption."""
    return element("figure", picture, element("figcaption", safe(*caption)))
