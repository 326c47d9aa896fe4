"""Experts of a mixture that transformers stores as one tensor: names and shapes of their weights."""

from __future__ import annotations

from torch import Tensor, nn

# For all experts: gate and up projections (experts, 2 * inner, features), down projections (experts, features, inner);
# gpt-oss and Llama 4 hold both the other way round. Biases, if any, are (experts, outputs).
GATE_UP, DOWN = "gate_up_proj", "down_proj"
GATE_UP_BIAS, DOWN_BIAS = f"{GATE_UP}_bias", f"{DOWN}_bias"

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


def projection(module: nn.Module, key: str, expert: int) -> tuple[Tensor, Tensor | None]:
    """(weight (outputs, inputs), bias (outputs,) or None) of one expert: views of the module's tensors ``key``."""
    experts = fused_experts(module)
    assert experts is not None
    weight = experts[0 if key == GATE_UP else 1][expert]
    bias = module._parameters.get(f"{key}_bias")
    return weight.mT if is_transposed(*experts) else weight, None if bias is None else bias[expert]


def is_expert_weight(name: str, parameter: Tensor) -> bool:
    """Whether a module's parameter ``name`` holds a weight of every expert."""
    return parameter.dim() == 3 and name in (GATE_UP, DOWN)
