"""The command line; each command stands in a module of :mod:`obc.commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from obc.commands import demo, info, report, score
from obc.commands.common import USAGE_ERROR, UsageError

COMMANDS = (demo, score, report, info)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.command(parsed))
    except UsageError as error:
        print(f"obc {parsed.name}: {error}", file=sys.stderr)
        return USAGE_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="obc", description="Structural pruning by Optimal Brain Connection.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="name")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
