"""``obc criteria``: the table of criteria."""

from __future__ import annotations

import argparse
from typing import Any

from obc.criteria.table import as_text


def add(commands: Any) -> None:
    """Add ``obc criteria`` to the subparsers."""
    criteria = commands.add_parser(
        "criteria",
        help="list the criteria: name, what each needs, its units, its source",
        description="List the criteria of obc prune --criterion: name, what each needs, its units, its source.",
    )
    criteria.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    """Print the table."""
    print(as_text())
    return 0
