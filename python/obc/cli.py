"""The command line; each command stands in a module of :mod:`obc.commands`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence

from obc.commands import bench, criteria, demo, evaluate, info, prune, recover, report, score
from obc.commands.common import USAGE_ERROR, UsageError

COMMANDS = (demo, score, prune, criteria, recover, evaluate, report, bench, info)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        with _plain_warnings(), _progress_lines():
            return int(parsed.command(parsed))
    except UsageError as error:
        print(f"obc {parsed.name}: {error}", file=sys.stderr)
        return USAGE_ERROR


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line each, without the place in obc's source that raised them."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *place, **more: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextlib.contextmanager
def _progress_lines() -> Iterator[None]:
    """A line of progress every 30 seconds on standard error, where that is no terminal and shows no bar."""
    logger, handler = logging.getLogger("obc.progress"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="obc", description="Structural pruning by Optimal Brain Connection.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="name")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
