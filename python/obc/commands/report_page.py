"""Scores as one HTML page: no script, nothing loaded from anywhere, every name escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import torch
from torch import Tensor

from obc.scoring import ChannelScores, Scores

_POINTS = 120  # of a curve; wider layers are drawn at as many quantiles
_CURVE_WIDTH, _CURVE_HEIGHT = 240, 90
_STRIP_WIDTH, _STRIP_HEIGHT = 1000, 220
_MARGIN = 2
_POSITIVE = 0.92  # of the height; the rest sets what scores nothing apart
_SIDES = (("out", "#D55E00"), ("in", "#0072B2"))  # told apart by colour-blind readers too (Okabe and Ito)

# Whatever a name or a file may hold, the browser must neither run nor fetch anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; } dd { margin: 0; }
svg { display: block; width: 100%; height: auto; background: #fafafa; }
.layers { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-size: 12px; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: right; padding: 2px 8px; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; overflow-wrap: anywhere; }
.unscored { background: #fdecea; }
.out { color: #D55E00; } .in { color: #0072B2; }
"""


def page(scores: Scores, source: str) -> str:
    """The page of ``scores``, which come from the file ``source``."""
    unscored = [name for name, how in scores.coverage.items() if not how.scored]
    facts = {
        "file": source,
        "modules scored": str(len(scores)),
        "unscored": str(len(unscored)),
        "rows": str(scores.num_rows),
        **{key: value for key, value in scores.metadata.items() if key != "rows"},
        "kind of rows": scores.metadata.get("rows", "unknown"),
    }
    listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    title = f"Scores of {escape(scores.metadata.get('model', 'a model'))}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{title}</h1><dl>{listed}</dl>",
            "<h2>Through the network</h2>",
            '<p>Every module\'s smallest, median and largest score of its <span class="out">out channels</span>, in '
            "the model's order; logarithmic.</p>",
            _strip(scores),
            "<h2>Layers</h2>",
            '<p>Scores of <span class="out">out</span> and <span class="in">in</span> channels, each sorted, largest '
            "first; logarithmic. Channels at the bottom line score nothing.</p>",
            f'<div class="layers">{"".join(_figure(name, scores[name]) for name in scores)}</div>',
            "<h2>Coverage</h2>",
            _table(scores),
            "</body></html>\n",
        ]
    )


def _values(scores: Tensor | None) -> list[float]:
    """Sorted, largest first, at most ``_POINTS`` of them; what is not finite is left out."""
    if scores is None:
        return []
    finite = scores.detach().float().cpu().flatten()
    ordered = finite[finite.isfinite()].sort(descending=True).values
    if len(ordered) > _POINTS:
        ordered = ordered[torch.linspace(0, len(ordered) - 1, _POINTS).round().long()]
    return ordered.tolist()


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest exponent of ten of the positive values."""
    exponents = [math.log10(value) for value in values if value > 0]
    low, high = min(exponents, default=0.0), max(exponents, default=1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _height(value: float, low: float, high: float, height: float) -> float:
    """Where a value is drawn, measured from the top; what scores nothing at the bottom."""
    if value <= 0:
        return height - _MARGIN
    share = (math.log10(value) - low) / (high - low)
    return round(_MARGIN + (1 - share) * (_POSITIVE * height - _MARGIN), 1)


def _figure(name: str, channels: ChannelScores) -> str:
    """One module's two curves."""
    curves = {"out": _values(channels.out_channels), "in": _values(channels.in_channels)}
    low, high = _range([value for values in curves.values() for value in values])
    lines = []
    for side, colour in _SIDES:
        values = curves[side]
        step = _CURVE_WIDTH / max(1, len(values) - 1)
        points = [f"{round(i * step, 1)},{_height(v, low, high, _CURVE_HEIGHT)}" for i, v in enumerate(values)]
        if len(points) == 1:
            points.append(f"{_CURVE_WIDTH},{points[0].split(',')[1]}")
        if points:
            lines.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    sizes = [
        f"{values.numel()} {side}"
        for side, values in (("out", channels.out_channels), ("in", channels.in_channels))
        if values is not None
    ]
    bounds = f"{10**low:.0e} to {10**high:.0e}"
    return (
        f'<figure><svg viewBox="0 0 {_CURVE_WIDTH} {_CURVE_HEIGHT}" role="img">{"".join(lines)}</svg>'
        f"<figcaption>{_name(name)}<br>{', '.join(sizes)}; {bounds}</figcaption></figure>"
    )


def _strip(scores: Scores) -> str:
    """Per module a bar from its smallest to its largest out-channel score, with a tick at the median."""
    spread = []
    for name in scores:
        values = _values(scores[name].out_channels)
        if values:
            spread.append((name, values[-1], values[len(values) // 2], values[0]))
    low, high = _range([value for _, *values in spread for value in values])
    step = _STRIP_WIDTH / max(1, len(spread))
    width = round(max(0.5, step * 0.7), 2)
    bars = []
    for index, (name, least, middle, most) in enumerate(spread):
        x = round(index * step, 2)
        bottom, tick, top = (_height(value, low, high, _STRIP_HEIGHT) for value in (least, middle, most))
        bars.append(
            f'<g><title>{_name(name)}: {least:.2e}, {middle:.2e}, {most:.2e}</title><rect x="{x}" y="{top}" '
            f'width="{width}" height="{max(0.5, round(bottom - top, 1))}" fill="#D55E00" opacity="0.45"/>'
            f'<rect x="{x}" y="{tick}" width="{width}" height="1.5" fill="#222"/></g>'
        )
    ends = (
        f'<text x="4" y="12" font-size="11">{10**high:.0e}</text>'
        f'<text x="4" y="{_STRIP_HEIGHT - 4}" font-size="11">{10**low:.0e}</text>'
    )
    return f'<svg viewBox="0 0 {_STRIP_WIDTH} {_STRIP_HEIGHT}" role="img">{"".join(bars)}{ends}</svg>'


def _table(scores: Scores) -> str:
    """Every module: its channels, the range of its out-channel scores, and how it was read, or why not."""
    head, *rows = scores.table()
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for how, row in zip(scores.coverage.values(), rows, strict=True):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f"<tr{'' if how.scored else ' class=unscored'}>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _name(name: str) -> str:
    return escape(name or "(model)")
