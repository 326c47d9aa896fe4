"""Which backend comes first, by device, operator, dtype and size: general order, and measured exceptions to it.

The exceptions are copied from committed results of ``benchmarks/gpu.sh`` (see :data:`FASTEST`), so that a choice is the
same in every process and nothing is timed while a program runs. ``OBC_BACKEND`` and ``use_backend`` go before all this.
"""

from __future__ import annotations

import torch

# By device: what is tried in turn where nothing was measured.
PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference"), "xpu": ("triton", "reference")}

# The size classes, and elements of one input below which a call belongs to each but the last. Reading two float32
# inputs of 2^18 elements takes a large GPU half a microsecond: a launch costs more. 2^24 elements take 30 us and no
# longer fit into its cache.
SIZES = ("small", "medium", "large")
_LIMITS = (2**18, 2**24)

# (operator, dtype, size) -> the backend that was faster on CUDA tensors. Empty until both have been measured there;
# `python -m benchmarks.fastest_table RESULTS.json` prints it from results of benchmarks/gpu.sh.
FASTEST: dict[tuple[str, torch.dtype, str], str] = {}


def size_class(elements: int) -> str:
    """``small``, ``medium`` or ``large``: how many elements the first input has."""
    return next((size for size, limit in zip(SIZES, _LIMITS, strict=False) if elements < limit), SIZES[-1])


def order(device_type: str, operator: str, dtype: torch.dtype, elements: int) -> tuple[str, ...]:
    """The names of the backends to try in turn for one call."""
    general = PREFERENCE.get(device_type, ("reference",))
    first = FASTEST.get((operator, dtype, size_class(elements))) if device_type == "cuda" else None
    return general if first is None else (first, *(name for name in general if name != first))
