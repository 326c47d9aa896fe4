"""The time and memory of a scoring run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Report:
    """Time and memory that ``obc.score`` took.

    Attributes:
        seconds: from the first batch to the last, including earlier runs that a checkpoint resumed.
        rows: rows that were added.
        peak_bytes: on CUDA the most that was allocated at once, including weights and batches; on the CPU the growth of
            the process's resident memory since the start; None if the system does not tell.
        kept_bytes: what obc holds between rows: the flat vectors and the kept rows.
    """

    seconds: float
    rows: int
    peak_bytes: int | None
    kept_bytes: int


class PeakMemory:
    """Measures peak memory from now on. Resets the peak of CUDA's allocator, or Linux's for this process."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cuda = [device for device in set(devices) if device.type == "cuda"]
        for device in self._cuda:
            torch.cuda.reset_peak_memory_stats(device)
        self._start = self._earlier = None
        if not self._cuda and _STATUS.exists():
            self._start, self._earlier = kernel_bytes(_STATUS, "VmRSS"), kernel_bytes(_STATUS, "VmHWM")
            # If resetting is not allowed, only a peak above all earlier ones is seen.
            with contextlib.suppress(OSError):
                _CLEAR_REFS.write_text("5")
                self._earlier = 0

    def read(self) -> int | None:
        """The peak in bytes, as in :class:`Report`."""
        if self._cuda:
            return sum(torch.cuda.max_memory_allocated(device) for device in self._cuda)
        peak = None if self._start is None else kernel_bytes(_STATUS, "VmHWM")
        if peak is None or self._start is None or self._earlier is None or peak <= self._earlier:
            return None
        return max(0, peak - self._start)


def kernel_bytes(path: Path, field: str) -> int | None:
    """A field of one of Linux's files about memory, in bytes."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])  # the kernel counts in KiB
    return None
