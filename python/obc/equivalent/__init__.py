"""Pruning that can be undone in training, folded: plans, compressors and decompressors, and compensation."""

from __future__ import annotations

from obc.equivalent.folded import EquivalentPruning, equivalent_pruning, merge
from obc.equivalent.plan import Kept, PlanError, PruningPlan

__all__ = ["EquivalentPruning", "Kept", "PlanError", "PruningPlan", "equivalent_pruning", "merge"]
