"""``obc report``: a score file as one self-contained page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from obc.commands.common import UsageError, writable
from obc.commands.report_page import page
from obc.files import atomic_write
from obc.scoring import Scores


def add(commands: Any) -> None:
    """Add ``obc report`` to the subparsers."""
    report = commands.add_parser(
        "report",
        help="draw a score file as one HTML page",
        description="Write a score file as one self-contained HTML page: every layer's scores and how they were read. "
        "It loads nothing from anywhere and runs no script.",
    )
    report.add_argument("scores", type=Path, help="a file that obc score, or Scores.save, wrote")
    report.add_argument("--out", type=Path, default=Path("report.html"), help="(default: %(default)s)")
    report.set_defaults(command=run)


def load(path: Path) -> Scores:
    """The scores of a file."""
    try:
        return Scores.load(path)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error


def run(parsed: argparse.Namespace) -> int:
    """Write the page: all of it, or nothing."""
    scores = load(parsed.scores)
    with atomic_write(writable(parsed.out)) as file:
        file.write(page(scores, parsed.scores.name).encode())
    print(f"{len(scores)} modules drawn in {parsed.out}")
    return 0
