"""Experts of a mixture that the transformers library stores as one tensor: the names and shapes of their weights."""

from __future__ import annotations

from torch import Tensor, nn

# Of all experts: gate and up projections (experts, 2 * inner, features), down projections (experts, features, inner).
GATE_UP, DOWN = "gate_up_proj", "down_proj"


def fused_experts(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(gate and up projections, down projections) of all experts, or None where the module holds none."""
    gate_up, down = (module._parameters.get(name) for name in (GATE_UP, DOWN))
    if gate_up is None or down is None or gate_up.dim() != 3 or down.dim() != 3:
        return None
    return gate_up, down


def is_expert_weight(name: str, parameter: Tensor) -> bool:
    """Whether a module's parameter ``name`` holds a weight of every expert."""
    return parameter.dim() == 3 and name in (GATE_UP, DOWN)
