"""Inputs of experts inside a module that holds all of them as three-dimensional parameters, and gradients there.

Such a module is called with hidden states (T, d), expert indices (T, k) and weights (T, k). Expert e computes
y = down_e h (+ b_e) with h = act(gate_e x) * up_e x, or another function of its gate and up projections that the module
names ``_apply_gate``, or without gates h = act(up_e x). The module returns the sum over a token's experts of g_e y_e.
The input h of a down projection is not the input of any module and is recomputed. With G the gradient of the loss with
respect to the module's output,

    dL/dy_e = g_e G        and        dL/dh_e = down_e^T dL/dy_e        at the tokens routed to e.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from obc.model.experts import DOWN, DOWN_BIAS, experts_of, is_gated, is_transposed, projection, up_name

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

    def at_output(self, grad: Tensor) -> Tensor:
        """(n, features) dL/dy of the expert's output, from the gradient of the module's output, (T, features)."""
        return grad[self.tokens] * self.gates.unsqueeze(1)

    def at_input(self, module: nn.Module, grad: Tensor) -> Tensor:
        """(n, width) dL/dx, from the gradient of the module's output."""
        at_output = self.at_output(grad)
        return at_output @ projection(module, DOWN, self.expert)[0].detach().to(at_output.dtype)


def expert_count(module: nn.Module) -> int:
    """The number of a mixture's experts."""
    return len(experts_of(module)[1])


def _up(module: nn.Module) -> str:
    name = up_name(module)
    assert name is not None
    return name


def expert_name(module: str, expert: int) -> str:
    """The name of one expert's statistics."""
    return f"{module}[{expert}]"


def inner_width(module: nn.Module) -> int:
    """The number of in channels of each down projection."""
    up, down = experts_of(module)
    return down.shape[1 if is_transposed(up, down) else 2]


def unreadable(module: nn.Module) -> str | None:
    """Why the inner channels of its experts can't be read, or None."""
    up, down = experts_of(module)
    copies = 2 if is_gated(module) else 1
    if not is_transposed(up, down) and up.shape != (len(down), copies * down.shape[2], down.shape[1]):
        return f"experts stored as {tuple(up.shape)} and {tuple(down.shape)} are not understood"
    own = [name for name, tensor in module._parameters.items() if tensor is not None]
    if others := sorted(set(own) - {_up(module), f"{_up(module)}_bias", DOWN, DOWN_BIAS}):
        return f"experts with {', '.join(others)} are not understood"
    if not callable(getattr(module, "_apply_gate", None)) and not callable(getattr(module, "act_fn", None)):
        return "experts without _apply_gate or act_fn are not understood"
    return None


def is_routed_call(inputs: Sequence[Any]) -> bool:
    """Whether a call's arguments are hidden states, expert indices and weights."""
    tensors = inputs[:3]
    if len(tensors) < 3 or not all(isinstance(value, Tensor) and value.dim() == 2 for value in tensors):
        return False
    hidden, indices, weights = tensors
    return not indices.is_floating_point() and indices.shape == weights.shape and len(hidden) == len(indices)


def routed_input(module: Any, expert: int, hidden: Tensor, indices: Tensor, weights: Tensor) -> RoutedInput:
    """The input of one expert's down projection; empty if no token was routed to it."""
    tokens, slots = torch.where((indices == expert) & (weights != 0))
    up = F.linear(hidden[tokens], *projection(module, _up(module), expert))
    return RoutedInput(expert, _activated(module, up), tokens, len(hidden), weights[tokens, slots])


def _activated(module: Any, up: Tensor) -> Tensor:
    """The inputs of a down projection, from the outputs of the gate and up projections, or of up projections alone."""
    if not is_gated(module):  # transformers gives these an _apply_gate too, and does not call it
        activated: Tensor = module.act_fn(up)
        return activated
    if (apply := getattr(module, "_apply_gate", None)) is not None:
        gated: Tensor = apply(up)
        return gated
    gate, up = up.chunk(2, -1)
    product: Tensor = module.act_fn(gate) * up
    return product


def mixed(
    module: nn.Module, inputs: Iterable[RoutedInput], like: Tensor, layers: Mapping[int, Callable[[Tensor], Tensor]]
) -> Tensor:
    """Sum over experts e of g_e y_e.

    Args:
        like: a tensor of the result's shape, dtype and device.
        layers: expert -> the layer that computes its output; the others' is computed from the module's tensors.
    """
    total = torch.zeros_like(like)
    for routed in inputs:
        layer = layers.get(routed.expert)
        y = F.linear(routed.x, *projection(module, DOWN, routed.expert)) if layer is None else layer(routed.x)
        total.index_add_(0, routed.tokens, (y * routed.gates.unsqueeze(1)).to(total.dtype))
    return total


class RoutedCalls:
    """Reads calls of modules with fused experts whose output is proved, once, to be that of the experts' parts.

    Attributes:
        readers: how many readers ask for the inputs of each call; several get the same, computed once. They must say by
            :meth:`begin` when a call begins.
    """

    def __init__(self) -> None:
        self.readers = 0
        self._proved: set[nn.Module] = set()
        self._latest: tuple[nn.Module, list[RoutedInput] | str] | None = None

    def begin(self) -> None:
        """A module with fused experts is called: forget the inputs of the call before."""
        self._latest = None

    def inputs(self, module: nn.Module, arguments: Sequence[Any], output: Any) -> list[RoutedInput] | str:
        """The input of every expert's down projection, empty for one that got no token; or why it can't be read."""
        if self._latest is not None and self._latest[0] is module:
            return self._latest[1]
        found = self._computed(module, arguments, output)
        if self.readers > 1:
            self._latest = module, found
        return found

    def _computed(self, module: nn.Module, arguments: Sequence[Any], output: Any) -> list[RoutedInput] | str:
        if (reason := unreadable(module)) is not None:
            return reason
        if not is_routed_call(arguments):
            return "it is not called with states, expert indices and weights"
        with torch.no_grad():
            inputs = [routed_input(module, e, *arguments[:3]) for e in range(expert_count(module))]
            if module not in self._proved:
                agrees = _make_up(module, inputs, output)
                if agrees is False:
                    formula = "act(gate(x)) * up(x)" if is_gated(module) else "act(up(x))"
                    return f"what its experts return is not down({formula}), weighted and added"
                if agrees:
                    self._proved.add(module)
        return inputs


def _make_up(module: nn.Module, inputs: Sequence[RoutedInput], output: Any) -> bool | None:
    """Whether the experts' down projections of these inputs, weighted and added, equal the module's output.

    None: the call can't tell, because something is not finite, no token was routed, or all outputs are zero.
    """
    if not isinstance(output, Tensor) or output.dim() != 2:
        return False
    if not any(len(routed.tokens) for routed in inputs):
        return None
    dtype = torch.promote_types(output.dtype, torch.float32)
    total = mixed(module, inputs, torch.empty_like(output, dtype=dtype), {})
    allowed = _AGREEMENT_OF_HALF if output.element_size() < 4 else _AGREEMENT
    distance = (total - output).norm()
    if not bool(distance.isfinite()) or bool(total.norm() + distance == 0):
        return None
    return bool(distance <= allowed * total.norm())
