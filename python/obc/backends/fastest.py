"""The preferred backend by device, operator, dtype and size: a general order, and measured exceptions.

The exceptions are copied from committed results of ``benchmarks/gpu.sh`` (see :data:`FASTEST`). The choice is thus the
same in every process, and nothing is timed while a program runs. ``OBC_BACKEND`` and ``use_backend`` take precedence.
"""

from __future__ import annotations

import bisect

import torch

# By device: the order of backends where nothing was measured.
PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference"), "xpu": ("triton", "reference")}

# The size classes: a call belongs to the first whose number of elements is above its input's, else to the last. Reading
# two float32 inputs of 2^18 elements takes a large GPU half a microsecond, less than a launch; 2^24 elements take 30 us
# and no longer fit into its cache.
SIZES = ("small", "medium", "large")
_LIMITS = (2**18, 2**24)

# (operator, dtype, size) -> the faster backend on CUDA tensors. Empty until both have been measured there;
# `python -m benchmarks.fastest_table RESULTS.json` prints it from results of benchmarks/gpu.sh.
FASTEST: dict[tuple[str, torch.dtype, str], str] = {}


def size_class(elements: int) -> str:
    """``small``, ``medium`` or ``large``, by the number of elements of the first input."""
    return SIZES[bisect.bisect(_LIMITS, elements)]


def order(device_type: str, operator: str, dtype: torch.dtype, elements: int) -> tuple[str, ...]:
    """The names of the backends to try, in order, for one call."""
    general = PREFERENCE.get(device_type, ("reference",))
    first = FASTEST.get((operator, dtype, size_class(elements))) if device_type == "cuda" else None
    return general if first is None else (first, *(name for name in general if name != first))
