"""``--log FILE``: logs a command with times: arguments, output, warnings, progress, and how it ended."""

from __future__ import annotations

import argparse
import contextlib
import logging
import platform
import shlex
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from obc.commands.common import UsageError, writable
from obc.distribution import obc_version
from obc.model.hooks import replaced

logger = logging.getLogger("obc.commands")


def add_log(parser: argparse.ArgumentParser) -> None:
    """Add ``--log`` to the options of a command that takes long."""
    parser.add_argument("--log", type=Path, metavar="FILE", help="also append to this file what is done, with times")


def say(*lines: object) -> None:
    """Print a command's lines, and log them."""
    for line in lines:
        print(line, flush=True)
        logger.info("%s", line)


@contextlib.contextmanager
def run_log(path: Path | None, arguments: Sequence[str]) -> Iterator[None]:
    """Log what happens inside the block; does nothing if ``path`` is None.

    Raises:
        UsageError: the file can't be written.
    """
    if path is None:
        yield
        return
    try:
        writable(path).parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"can't write --log {path}: {error}") from error
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handlers: list[logging.Handler] = [file]
    if not logging.getLogger().handlers:  # Python prints warnings only while no handler exists
        handlers.append(_warnings_on_standard_error())
    package = logging.getLogger("obc")
    level = package.level
    for handler in handlers:
        package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        with _logged_warnings():
            yield from _logged_run(arguments)
    finally:
        for handler in handlers:
            package.removeHandler(handler)
        package.setLevel(level)
        file.close()


def _logged_run(arguments: Sequence[str]) -> Iterator[None]:
    started = time.monotonic()
    logger.info("obc %s", shlex.join(arguments))
    versions = f"obc {obc_version() or 'source tree'}, torch {torch.__version__}, Python {platform.python_version()}"
    logger.info("%s, %d threads", versions, torch.get_num_threads())
    try:
        yield
    except UsageError as error:
        logger.error("refused: %s", error)
        raise
    except KeyboardInterrupt:
        logger.error("interrupted after %.1f s", time.monotonic() - started)
        raise
    except BaseException:
        logger.exception("failed after %.1f s", time.monotonic() - started)
        raise
    logger.info("ended after %.1f s", time.monotonic() - started)


def _warnings_on_standard_error() -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.addFilter(lambda record: record.name not in ("obc.commands", "obc.progress"))
    return handler


def _logged_warnings() -> contextlib.AbstractContextManager[None]:
    """Log warnings in addition to showing them."""
    shown = warnings.showwarning

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        shown(message, category, filename, lineno, file, line)
        logger.warning("%s", message)

    return replaced(warnings, showwarning=show)
