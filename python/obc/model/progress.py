"""A line of progress in the log where no progress bar is shown because the output is no terminal."""

from __future__ import annotations

import logging
import sys
import time

logger = logging.getLogger("obc.progress")

# Seconds between two lines.
_EVERY = 30.0


class ProgressLog:
    """Logs progress at most every 30 seconds, at level INFO of the logger "obc.progress".

    Args:
        name: of the work that is logged.
        progress: as every ``progress`` argument: None says it where standard error is no terminal, because a bar is
            shown there; True always shows a bar, False nothing.
    """

    def __init__(self, name: str, progress: bool | None) -> None:
        self._name = name
        self._speaks = progress is None and not sys.stderr.isatty()
        self._began = self._said = time.monotonic()
        self.doing = ""

    def tick(self, done: int, total: int | None, unit: str = "batch") -> None:
        """``done`` of ``total`` are done; ``doing`` says of what."""
        now = time.monotonic()
        if not self._speaks or now - self._said < _EVERY:
            return
        self._said = now
        whole = "" if total is None else f" of {total}"
        doing = f"{self.doing}, " if self.doing else ""
        logger.info("%s: %s%s %d%s, %.0f s", self._name, doing, unit, done, whole, now - self._began)
