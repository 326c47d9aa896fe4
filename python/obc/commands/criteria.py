"""``obc criteria``: the table of criteria; ``docs/criteria.md`` has more about each."""

from __future__ import annotations

import argparse
from typing import Any

from obc.commands.common import add_command
from obc.criteria import About, available, get
from obc.model.readable import aligned

PASSES = {
    "weights": "weights alone",
    "forward": "forward passes",
    "gradients": "gradients, no labels",
    "labels": "gradients of a loss",
}
_SUMMARY = "list the criteria: name, what each needs, its units, its source"
_DESCRIPTION = "List the criteria of obc prune --criterion: name, what each needs, its units, its source."


def add(commands: Any) -> None:
    """Add ``obc criteria`` to the subparsers."""
    add_command(commands, "criteria", run, _SUMMARY, _DESCRIPTION)


def rows() -> list[tuple[str, Any, About | None]]:
    """(name, criterion, about) of every registered criterion."""
    found = [(name, get(name)) for name in available()]
    return [(name, criterion, getattr(criterion, "about", None)) for name, criterion in found]


def run(parsed: argparse.Namespace) -> int:
    """Print one line per criterion: name, what it needs, units, system, source."""
    lines = [("name", "needs", "units", "system", "source")]
    for name, _, about in rows():
        known = () if about is None else (PASSES[about.passes], about.kinds, about.system, about.source)
        lines.append((name, *(known or [""] * 4)))
    print("\n".join(aligned(lines)))
    return 0
