"""Progress of long work: a bar in a terminal, lines of the log elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

logger = logging.getLogger("obc.progress")

# Seconds between two lines.
_EVERY = 30.0


def progress_bar(progress: bool | None, work: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """tqdm's bar over ``work``, or one to update by hand; None shows it in a terminal only."""
    return tqdm(work, disable=None if progress is None else not progress, **options)


class ProgressLog:
    """Logs progress at most every 30 seconds, at level INFO of the logger "obc.progress".

    Args:
        name: name of the work.
        progress: as in every ``progress`` argument: None logs if standard error is not a terminal (a bar is shown there
            otherwise); True always shows a bar; False shows nothing.
    """

    def __init__(self, name: str, progress: bool | None) -> None:
        self._name = name
        self._speaks = progress is None and not sys.stderr.isatty()
        self._began = self._said = time.monotonic()
        self.doing = ""

    def tick(self, done: int, total: int | None, unit: str = "batch") -> None:
        """Report that ``done`` of ``total`` are done; ``doing`` names the work."""
        now = time.monotonic()
        if not self._speaks or now - self._said < _EVERY:
            return
        self._said = now
        whole = "" if total is None else f" of {total}"
        doing = f"{self.doing}, " if self.doing else ""
        logger.info("%s: %s%s %d%s, %.0f s", self._name, doing, unit, done, whole, now - self._began)
