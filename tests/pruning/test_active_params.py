"""A budget of the parameters that one token of a mixture meets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Case
from sweep_configs import tiny_config
from sweep_model import model_class
from torch import nn
from transformers_families import FAMILIES, qwen2_moe

import obc
from obc.structures.transformers import TransformersStructure
from obc.structures.transformers.costs import macs_for_one_token


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


@pytest.mark.parametrize("name", ["jetmoe", "gemma4_text", "nemotron_h", "aria_text", "hunyuan_v1_moe", "zaya"])
def test_how_many_experts_a_token_meets_is_found(name: str) -> None:
    """The routers call it by several names, or leave it to the config; JetMoE's experts lie in two modules."""
    config_class, chosen = model_class("causal", name)
    model = chosen(tiny_config(config_class, "causal", name))
    tokens = 2 if name != "zaya" else 1
    experts = 4 if name != "nemotron_h" else 6
    held = {
        key: parameter
        for key, parameter in model.named_parameters()
        if parameter.dim() == 3 and "conv" not in key and len(parameter) == experts
    }
    assert held
    everything = sum(parameter.numel() for parameter in model.parameters())
    unused = sum(parameter.numel() * (experts - tokens) // experts for parameter in held.values())
    assert TransformersStructure(model).costs("active_parameters").total() == everything - unused
    macs = macs_for_one_token(model)
    for key, parameter in held.items():
        module, expert = key.rpartition(".")[0], parameter[0].numel()
        assert macs[module] == tokens * sum(one[0].numel() for k, one in held.items() if k.startswith(f"{module}."))
        assert macs[module] >= tokens * expert


def test_the_cost_of_a_mixture_whose_router_says_nothing_is_refused() -> None:
    case = qwen2_moe()
    structure = TransformersStructure(case.model, ["ffn"])
    del case.model.get_submodule("model.layers.0.mlp.gate").top_k
    for module in case.model.modules():
        vars(module).pop("config", None)
    with pytest.raises(
        ValueError, match=r"how many experts of model\.layers\.0\.mlp\.experts a token is sent to is not"
    ):
        structure.costs("active_parameters")


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
