"""Pruning that can be undone in training, folded: plans, compressors and decompressors, and compensation."""

from __future__ import annotations

from obc.equivalent.plan import Kept, PlanError, PruningPlan

__all__ = ["Kept", "PlanError", "PruningPlan"]
