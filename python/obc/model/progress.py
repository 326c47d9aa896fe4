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
        progress: as in every ``progress`` argument: None logs if standard error is not a terminal (a bar is shown there
            otherwise); True always shows a bar; False shows nothing.
    """

    def __init__(self, name: str, progress: bool | None) -> None:
        self._name = name
        self._speaks = progress is None and not sys.stderr.isatty()
        self._began = self._said = time.monotonic()
        self._passes: dict[str, tuple[int, float, int]] = {}  # of a unit: what was done when, and what is done now
        self.doing = ""

    def tick(self, done: int, total: int | None, unit: str = "batch") -> None:
        """Report that ``done`` of ``total`` are done, and when all will be; ``doing`` names the work."""
        now = time.monotonic()
        first, since, last = self._passes.get(unit, (done, now, done))
        if done < last:  # another pass has begun
            first, since = done, now
        self._passes[unit] = first, since, done
        if not self._speaks or now - self._said < _EVERY:
            return
        self._said = now
        whole = "" if total is None else f" of {total}"
        doing = f"{self.doing}, " if self.doing else ""
        left = ""
        if total is not None and done > first:
            left = f", about {(now - since) / (done - first) * (total - done):.0f} s until {unit} {total}"
        logger.info("%s: %s%s %d%s, %.0f s%s", self._name, doing, unit, done, whole, now - self._began, left)


class LayerProgress:
    """The progress of work on layers, each of which takes passes over batches: a bar, and lines of the log.

    Args:
        progress: as in :class:`ProgressLog`.
    """

    def __init__(self, name: str, progress: bool | None) -> None:
        self._bar, self._log = progress_bar(progress, desc=name, unit="layer"), ProgressLog(name, progress)
        self._done, self._total = 0, 0

    def begin(self, doing: str, layers: int = 0) -> None:
        """Begin a part of the work, on this many layers."""
        self._done, self._total, self._log.doing = 0, layers, doing
        self._bar.reset(layers)
        self._bar.set_postfix_str(doing)

    def update(self) -> None:
        """A layer is done."""
        self._done += 1
        self._bar.update()
        self._log.tick(self._done, self._total, "layer")

    def on_batch(self, number: int, count: int | None) -> None:
        """A batch begins."""
        if self._done:
            self._log.tick(self._done, self._total, "layer")
        else:
            self._log.tick(number, count)

    def __enter__(self) -> LayerProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
