"""Selects which units to remove: costs, and the choice of sets under a budget."""

from __future__ import annotations

from obc.model.costs import Costs
from obc.selection.choice import BudgetError, select
from obc.selection.interactions import estimated_shrinkage

__all__ = ["BudgetError", "Costs", "estimated_shrinkage", "select"]
