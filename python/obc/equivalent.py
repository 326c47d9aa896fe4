"""The names of :mod:`obc.recovery` and of plans, where older code imports them from."""

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
