"""Inputs of experts inside a module that holds all of them as three-dimensional parameters.

Such a module is called with hidden states (T, d), expert indices (T, k) and weights (T, k). Expert e computes down_e h
with h = act(gate_e x) * up_e x. The input h of its down projection is not the input of any module and is recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obc.model.experts import DOWN, GATE_UP, fused_experts

# The experts' output may differ by rounding from the output of their parts.
_AGREEMENT, _AGREEMENT_OF_HALF = 1e-3, 5e-2


@dataclass(frozen=True, eq=False)
class RoutedInput:
    """The input of one expert's down projection in one call.

    Attributes:
        expert: number of the expert.
        x: (n, width).
        tokens: (n,) int64, the call's tokens that they come from.
        total: number of tokens in the call.
        gates: (n,) the factors of the expert's outputs.
    """

    expert: int
    x: Tensor
    tokens: Tensor
    total: int
    gates: Tensor

    def where(self, counted: Tensor) -> RoutedInput:
        """The same for the tokens where ``counted``, (n,) bool, is true."""
        return RoutedInput(self.expert, self.x[counted], self.tokens[counted], self.total, self.gates[counted])


def expert_count(module: nn.Module) -> int:
    return len(_weights(module)[1])


def _weights(module: nn.Module) -> tuple[Tensor, Tensor]:
    experts = fused_experts(module)
    assert experts is not None
    return experts


def expert_name(module: str, expert: int) -> str:
    """The name of one expert's statistics."""
    return f"{module}[{expert}]"


def inner_width(module: nn.Module) -> int:
    """The number of in channels of each down projection."""
    return _weights(module)[1].shape[2]


def unreadable(module: nn.Module) -> str | None:
    """Why the inner channels of its experts can't be read, or None."""
    up, down = _weights(module)
    if getattr(module, "is_transposed", False) or up.shape != (len(down), 2 * down.shape[2], down.shape[1]):
        return f"experts stored as {tuple(up.shape)} and {tuple(down.shape)} are not understood"
    own = [name for name, tensor in module._parameters.items() if tensor is not None]
    if others := sorted(set(own) - {GATE_UP, DOWN}):
        return f"experts with {', '.join(others)} are not understood"
    return None


def is_routed_call(inputs: Sequence[Any]) -> bool:
    """Whether a call's arguments are hidden states, expert indices and weights."""
    tensors = inputs[:3]
    if len(tensors) < 3 or not all(isinstance(value, Tensor) and value.dim() == 2 for value in tensors):
        return False
    hidden, indices, weights = tensors
    return not indices.is_floating_point() and indices.shape == weights.shape and len(hidden) == len(indices)


def routed_inputs(module: Any, hidden: Tensor, indices: Tensor, weights: Tensor) -> Iterator[RoutedInput]:
    """The input of the down projection of every expert that got tokens."""
    for expert in range(expert_count(module)):
        routed = routed_input(module, expert, hidden, indices, weights)
        if len(routed.tokens):
            yield routed


def routed_input(module: Any, expert: int, hidden: Tensor, indices: Tensor, weights: Tensor) -> RoutedInput:
    """The input of one expert's down projection; empty if no token was routed to it."""
    tokens, slots = torch.where(indices == expert)
    gate, up = F.linear(hidden[tokens], _weights(module)[0][expert]).chunk(2, -1)
    return RoutedInput(expert, module.act_fn(gate) * up, tokens, len(hidden), weights[tokens, slots])


def make_up(module: nn.Module, inputs: Sequence[RoutedInput], output: Any) -> bool:
    """Whether the experts' down projections of these inputs, weighted and added, equal the module's output."""
    if not isinstance(output, Tensor) or output.dim() != 2:
        return False
    total = torch.zeros(output.shape, dtype=torch.promote_types(output.dtype, torch.float32), device=output.device)
    down = _weights(module)[1]
    for routed in inputs:
        outputs = F.linear(routed.x, down[routed.expert]) * routed.gates.unsqueeze(1)
        total.index_add_(0, routed.tokens, outputs.to(total.dtype))
    allowed = _AGREEMENT_OF_HALF if output.element_size() < 4 else _AGREEMENT
    distance = (total - output).norm()
    return not bool(distance.isfinite()) or bool(distance <= allowed * total.norm())
