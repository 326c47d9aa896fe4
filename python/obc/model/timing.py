"""Median wall time of calls, by the clock on the CPU and by events on CUDA."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

REPEATS, WARM_UPS = 15, 3


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, including all of its work on ``device``."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.device(device):
            torch.cuda.synchronize(device)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def median_seconds(
    calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int = REPEATS, warm_ups: int = WARM_UPS
) -> list[float]:
    """The median time of every call. The calls take turns, so that a drift of the machine affects all alike."""
    taken: list[list[float]] = [[] for _ in calls]
    for number in range(warm_ups + repeats):
        for call, times in zip(calls, taken, strict=True):
            seconds = seconds_of(call, device)
            if number >= warm_ups:
                times.append(seconds)
    return [statistics.median(times) for times in taken]
