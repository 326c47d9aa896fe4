"""Experts of a mixture that transformers stores as one tensor: names and shapes of their weights."""

from __future__ import annotations

from torch import Tensor, nn

# For all experts: gate and up projections (experts, 2 * inner, features), down projections (experts, features, inner);
# gpt-oss and Llama 4 hold both the other way round.
GATE_UP, DOWN = "gate_up_proj", "down_proj"

# Biases that routers add to scores only to choose experts, such as e_score_correction_bias.
CORRECTION = "correction_bias"


def fused_experts(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(gate and up projections, down projections) of all experts, or None if the module holds none."""
    gate_up, down = (module._parameters.get(name) for name in (GATE_UP, DOWN))
    if gate_up is None or down is None or gate_up.dim() != 3 or down.dim() != 3:
        return None
    return gate_up, down


def is_transposed(gate_up: Tensor, down: Tensor) -> bool:
    """Whether the shapes are (experts, features, 2 * inner) and (experts, inner, features)."""
    return gate_up.shape[1:] == (down.shape[2], 2 * down.shape[1])


def is_expert_weight(name: str, parameter: Tensor) -> bool:
    """Whether a module's parameter ``name`` holds a weight of every expert."""
    return parameter.dim() == 3 and name in (GATE_UP, DOWN)
