"""Pruning a whole model in one call, and what that needs: groups, costs, criteria."""

from __future__ import annotations

from obc.pruning.report import PruningReport, PruningResult, ReportError, StepReport
from obc.pruning.run import prune
from obc.structures.protocol import Structure

__all__ = ["PruningReport", "PruningResult", "ReportError", "StepReport", "Structure", "prune"]
