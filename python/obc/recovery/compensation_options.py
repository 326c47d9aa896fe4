"""The options of compensation, for both of its runs: by errors layer by layer, and by least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from obc.model.evaluation import ForwardFn
from obc.model.plan import PruningPlan
from obc.model.processes import Processes


@dataclass(frozen=True)
class CompensationOptions:
    """Checked arguments of :func:`obc.recovery.compensate`; ``plan`` is by layer, of fused experts one each."""

    mode: str
    forward: ForwardFn
    ridges: Sequence[float]
    offload: bool
    max_bytes: int
    keep_decompressors: bool
    processes: Processes
    plan: PruningPlan
