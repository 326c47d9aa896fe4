"""Shared parts of the tests of Equivalent Pruning."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from prunable import RECIPES, Pruned
from torch import Tensor, nn

from obc.recovery import EquivalentPruning, equivalent_pruning

# One optimizer step is linear in the gradients, whose rounding is 1e-16 of a sum of some hundred terms.
EXACT = 1e-11

both_factors = pytest.mark.parametrize("factors", ["full", "reduced"])


def folded(name: str, factors: Literal["full", "reduced"] = "full") -> tuple[Pruned, EquivalentPruning]:
    pruned = RECIPES[name].prune()
    return pruned, equivalent_pruning(copy.deepcopy(pruned.model), pruned.state_dict, pruned.plan, factors=factors)


def perturb_factors(equivalent: EquivalentPruning) -> None:
    """Factors away from the identity: there a gather would do."""
    with torch.no_grad():
        for factor in equivalent.param_groups(0.1, 0.0)[1]["params"]:
            factor.add_(torch.randn_like(factor), alpha=0.1)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    target = torch.linspace(-1, 1, output.numel(), dtype=x.dtype).reshape(output.shape)
    return (output - target).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
