"""Pruning that can be undone in training, folded: plans, compressors and decompressors, and compensation."""

from __future__ import annotations

from obc.model.kept import Kept, PlanError
from obc.model.plan import PruningPlan
from obc.recovery.calibration import recalibrate_norms
from obc.recovery.compensate import CompensationReport, LayerCompensation, compensate
from obc.recovery.equivalent_pruning import EquivalentPruning, equivalent_pruning, merge

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
