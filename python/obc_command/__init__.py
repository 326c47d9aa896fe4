"""The command ``obc``: imports nothing that takes time, so that Ctrl-C ends it in one line from its first moment."""

from __future__ import annotations

import signal
import sys
from typing import Any

INTERRUPTED = 130  # as shells report a process that SIGINT ended


def main() -> int:
    """Run :func:`obc.cli.main`; after Ctrl-C print one line and return 130, also while modules are imported.

    Imports may turn KeyboardInterrupt into another error (transformers' lazy ones do), so the signal is remembered.
    A SIGINT that the parent process ignores stays ignored.
    """
    interrupted = False

    def interrupt(*signal_and_frame: Any) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        from obc.cli import main as run

        return run()
    except BaseException:
        if not interrupted:
            raise
    print("obc: interrupted", file=sys.stderr)
    return INTERRUPTED
