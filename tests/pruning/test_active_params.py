"""A budget of the parameters that one token of a mixture meets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Case
from torch import nn
from transformers_families import FAMILIES, qwen2_moe

import obc
from obc.structures.transformers import TransformersStructure


def met_by_a_token(model: Any) -> int:
    """Counted by hand: everything but the experts, and of these two of four."""
    experts = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
    everything = sum(parameter.numel() for parameter in model.parameters())
    return everything - sum(parameter.numel() - parameter.numel() // len(parameter) * 2 for parameter in experts)


def _loss(case: Case) -> Any:
    return lambda model, batch: case.loss(model, batch)


def test_costs_are_what_a_token_meets() -> None:
    case = qwen2_moe()
    structure = TransformersStructure(case.model)
    costs = structure.costs("active_parameters")
    assert costs.total() == met_by_a_token(case.model)
    marginal = dict(zip(costs.names, costs.marginal().tolist(), strict=True))
    for group in structure.groups:
        before = met_by_a_token(case.model)
        structure.remove({group.name: torch.tensor([0])})
        freed = before - met_by_a_token(case.model)
        if group.kind in ("heads", "ffn"):
            assert freed == marginal[group.name]
        assert structure.costs("active_parameters").total() == met_by_a_token(case.model)


def test_the_budget_is_met() -> None:
    case = qwen2_moe()
    before = met_by_a_token(case.model)
    structure = TransformersStructure(case.model, ["ffn", "expert_ffn"])
    result = obc.prune(
        case.model, batches=case.batches, loss_fn=_loss(case), active_params=0.85, steps=2, structure=structure
    )
    assert met_by_a_token(case.model) <= 0.85 * before
    assert result.report.steps[-1].remaining == pytest.approx(met_by_a_token(case.model) / before)


def test_dense_models_meet_all_and_traced_ones_are_refused() -> None:
    structure = TransformersStructure(FAMILIES["llama"]().model)
    assert structure.costs("active_parameters").total() == structure.costs("parameters").total()
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    batches = [(torch.randn(6, 4), torch.randn(6, 2)) for _ in range(4)]
    with pytest.raises(ValueError, match="pass params, or macs"):
        obc.prune(model, torch.randn(2, 4), batches, lambda m, b: (m(b[0]) - b[1]).square().mean(), active_params=0.5)
    with pytest.raises(ValueError, match="two budgets"):
        obc.prune(model, torch.randn(2, 4), batches, lambda m, b: m(b[0]).mean(), active_params=0.5, macs=0.5)
