"""The peak of allocated memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator had handed out during ``call``, above the amount at its start.

    Counted from every allocation and release in torch's profiler, so it does not depend on the machine. Memory that
    kernels allocate elsewhere is not included.
    """
    # Kineto reads this when it first runs; otherwise it would print its start and stop on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    gc.collect()  # otherwise reference cycles of earlier calls would count as released during this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    recorded = profiler.profiler
    assert recorded is not None
    assert recorded.kineto_results is not None
    changes = [(e.start_ns(), e.nbytes()) for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        allocated += change
        peak = max(peak, allocated)
    return peak
