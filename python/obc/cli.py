"""The command line; each command has a module in :mod:`obc.commands`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence

from obc.commands import bench, completion, criteria, demo, evaluate, info, prune, recover, report, score
from obc.commands.common import BROKEN_PIPE, INTERRUPTED, USAGE_ERROR, OneLineParser, UsageError, refuse_overwriting
from obc.commands.run_log import run_log
from obc.distribution import DISTRIBUTION, obc_version
from obc.model.hooks import replaced

# What the operating system says if a disk is full, a quota is used up, a file too large or a disk read-only.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

COMMANDS = (demo, score, prune, criteria, recover, evaluate, report, bench, info, completion)

_EPILOG = """\
exit codes: 0 done; 2 the request can't be carried out as it stands, one line says why and what to do; 1 an error that
obc did not foresee, with its traceback; 130 interrupted; of obc bench the highest of its benchmarks'."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (:mod:`obc.commands.common`)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    parsed = parser.parse_args(arguments)
    parsed.parser = parser
    try:
        refuse_overwriting(parsed)
        with _plain_warnings(), _progress_lines(), run_log(getattr(parsed, "log", None), arguments):
            return int(parsed.command(parsed))
    except UsageError as error:
        print(f"obc {parsed.name}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:  # the reader has closed the pipe: obc info | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        print(f"obc {parsed.name}: {error}; make room, or choose another place to write to", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print(f"obc {parsed.name}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _plain_warnings() -> contextlib.AbstractContextManager[None]:
    """Print warnings as one line each, without the location in obc's source."""
    return replaced(warnings, formatwarning=lambda message, *place, **more: f"warning: {message}\n")


@contextlib.contextmanager
def _progress_lines() -> Iterator[None]:
    """Print progress to standard error every 30 seconds if it is not a terminal and shows no bar."""
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
    parser = OneLineParser(
        prog="obc",
        description="Structural pruning by Optimal Brain Connection.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"{DISTRIBUTION} {obc_version() or '(source tree)'}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="name")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
