"""The table of criteria that ``obc criteria`` prints; ``docs/criteria.md`` has more about each."""

from __future__ import annotations

from typing import Any

from obc.criteria.protocol import About
from obc.criteria.registry import available, get

PASSES = {
    "weights": "weights alone",
    "forward": "forward passes",
    "gradients": "gradients, no labels",
    "labels": "gradients of a loss",
}


def rows() -> list[tuple[str, Any, About | None]]:
    """(name, criterion, about) of every registered criterion."""
    found = [(name, get(name)) for name in available()]
    return [(name, criterion, getattr(criterion, "about", None)) for name, criterion in found]


def as_text() -> str:
    """One line per criterion: name, what it needs, units, system, source."""
    lines = [("name", "needs", "units", "system", "source")]
    for name, _, about in rows():
        if about is None:
            lines.append((name, "", "", "", ""))
        else:
            lines.append((name, PASSES[about.passes], about.kinds, about.system, about.source))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
