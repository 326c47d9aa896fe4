"""Recovery after pruning: compensation, recalibration, folded fine-tuning, distillation."""

from __future__ import annotations

from obc.model.kept import Kept, PlanError
from obc.model.plan import PruningPlan
from obc.recovery.calibration import recalibrate_norms
from obc.recovery.compensate import compensate
from obc.recovery.compensation_report import CompensationReport, LayerCompensation, LayerCorrection
from obc.recovery.distillation import Distillation, hidden_distillation, logit_distillation
from obc.recovery.equivalent_pruning import EquivalentPruning, equivalent_pruning, merge
from obc.recovery.recover import RecoveryReport, recover

__all__ = [
    "CompensationReport",
    "Distillation",
    "EquivalentPruning",
    "Kept",
    "LayerCompensation",
    "LayerCorrection",
    "PlanError",
    "PruningPlan",
    "RecoveryReport",
    "compensate",
    "equivalent_pruning",
    "hidden_distillation",
    "logit_distillation",
    "merge",
    "recalibrate_norms",
    "recover",
]
