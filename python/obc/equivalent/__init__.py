"""Pruning that can be undone in training, folded: plans, compressors and decompressors, and compensation."""

from __future__ import annotations

from obc.equivalent.calibration import recalibrate_norms
from obc.equivalent.compensate import CompensationReport, LayerCompensation, compensate
from obc.equivalent.folded import EquivalentPruning, equivalent_pruning, merge
from obc.equivalent.plan import Kept, PlanError, PruningPlan

__all__ = [
    "CompensationReport",
    "EquivalentPruning",
    "Kept",
    "LayerCompensation",
    "PlanError",
    "PruningPlan",
    "compensate",
    "equivalent_pruning",
    "merge",
    "recalibrate_norms",
]
