"""The names of :mod:`obc.recovery` and of plans, for older code that imports them from here."""

from obc.recovery import (
    CompensationReport,
    EquivalentPruning,
    Kept,
    LayerCompensation,
    PlanError,
    PruningPlan,
    compensate,
    equivalent_pruning,
    merge,
    recalibrate_norms,
)

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
