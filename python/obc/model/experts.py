"""Experts of a mixture that transformers stores as one tensor: names and shapes of their weights."""

from __future__ import annotations

from torch import Tensor, nn

# For all experts: gate and up projections (experts, 2 * inner, features), or without gates up projections (experts,
# inner, features); down projections (experts, features, inner). gpt-oss and Llama 4 hold gated ones the other way
# round. Biases, if any, are (experts, outputs).
GATE_UP, UP, DOWN = "gate_up_proj", "up_proj", "down_proj"
DOWN_BIAS = f"{DOWN}_bias"

# Biases that routers add to scores only to choose experts, such as e_score_correction_bias: a part of their names.
CORRECTIONS = ("correction_bias", "expert_bias", "balancing_bias")

_SEPARATE_GATES = "gate_proj"


def is_correction(key: str) -> bool:
    """Whether a tensor of this name is added to the scores of experts only to choose among them."""
    return any(name in key for name in CORRECTIONS)


def up_name(module: nn.Module) -> str | None:
    """The name of the module's tensor of gate and up projections, or of up projections without gates (Nemotron-H)."""
    if module._parameters.get(GATE_UP) is not None:
        return GATE_UP
    ungated = module._parameters.get(UP) is not None and module._parameters.get(_SEPARATE_GATES) is None
    return UP if ungated else None


def fused_experts(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """(gate and up projections, down projections) of all experts, or None if the module holds none."""
    name, down = up_name(module), module._parameters.get(DOWN)
    up = None if name is None else module._parameters.get(name)
    if up is None or down is None or up.dim() != 3 or down.dim() != 3:
        return None
    return up, down


def experts_of(module: nn.Module) -> tuple[Tensor, Tensor]:
    """The same of a module known to hold experts.

    Raises:
        TypeError: it holds none.
    """
    experts = fused_experts(module)
    if experts is None:
        raise TypeError(f"holds no experts: {type(module).__name__}")
    return experts


def is_parallel(module: nn.Module) -> bool:
    """Whether its only parameter is a weight of every expert, (experts, outputs, inputs), as in JetMoE."""
    own = dict(module.named_parameters(recurse=False))
    weight = own.get("weight")
    return len(own) == 1 and weight is not None and weight.dim() == 3 and len(weight) == vars(module).get("num_experts")


def is_gated(module: nn.Module) -> bool:
    """Whether each inner channel has a gate beside its up projection."""
    return up_name(module) == GATE_UP


def is_transposed(up: Tensor, down: Tensor) -> bool:
    """Whether the shapes are (experts, features, 2 * inner) and (experts, inner, features)."""
    return up.shape[1:] == (down.shape[2], 2 * down.shape[1])


def projection(module: nn.Module, key: str, expert: int) -> tuple[Tensor, Tensor | None]:
    """(weight (outputs, inputs), bias (outputs,) or None) of one expert: views of the module's tensors ``key``."""
    experts = experts_of(module)
    weight = experts[1 if key == DOWN else 0][expert]
    bias = module._parameters.get(f"{key}_bias")
    return weight.mT if is_transposed(*experts) else weight, None if bias is None else bias[expert]


def expert_weights(module: nn.Module) -> tuple[str, ...]:
    """The names of the module's tensors with a weight of every expert; none if it holds no experts."""
    name = up_name(module)
    return () if fused_experts(module) is None or name is None else (name, DOWN)
