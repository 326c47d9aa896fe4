"""Measurements in a process of their own: how far its resident memory rises, and what a run takes."""

from __future__ import annotations

import ctypes
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def run(module: str, arguments: Sequence[object]) -> dict[str, Any]:
    """The JSON in the last line that ``python -m benchmarks.<module> <arguments>`` prints.

    Where it fails, {"failed": the last line of its error}.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if ran.returncode:
        reason = f"killed by signal {-ran.returncode}" if ran.returncode < 0 else "no message"
        return {"failed": (ran.stderr.strip().splitlines() or [reason])[-1]}
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def measure(call: Callable[[], object], repeats: int = 1) -> dict[str, Any]:
    """Seconds (median of ``repeats``) and MiB: resident at the start, and the peak during the calls above that.

    On Linux what is freed already is given back and the process's high-water mark set back first; elsewhere the mark is
    that of the whole process.
    """
    if _CLEAR.exists():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
        if trim is not None:
            trim(0)
        _CLEAR.write_text("5")
    before, taken = resident(), []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return {"seconds": statistics.median(taken), "start_mib": before, "peak_mib": max(0.0, peak() - before)}


def resident() -> float:
    """MiB of this process that are resident now."""
    return _of_status("VmRSS") if _STATUS.exists() else _maxrss()


def peak() -> float:
    """The high-water mark in MiB."""
    return _of_status("VmHWM") if _STATUS.exists() else _maxrss()


def _of_status(key: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) / 1024


def _maxrss() -> float:
    """Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
