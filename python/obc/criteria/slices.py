"""The weights that the slices of a group take entries from, layers' or those of all experts.

A whole expert's slices are its row of the router, its gate and up projections, and its down projection. Biases, norms
and correction biases of routers are no part of a slice's weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from obc.criteria.units import by_unit, weight_of
from obc.model.experts import DOWN, expert_weights, experts_of, is_transposed
from obc.model.groups import ChannelGroup, Slice
from obc.model.rules import Rule, rule_for

# What criteria of these weights score.
KINDS = "channels, heads, experts"


@dataclass(frozen=True, eq=False)
class SliceWeight:
    """The weight of one slice.

    Attributes:
        name: name of the weight in statistics: the layer's, or the experts' tensor's.
        weight: the weight, without gradient.
        part: the slice.
        module: the layer, or the mixture.
        axis: dimension of the slice's channels in a tensor of experts or a router; None for a layer.
        matrices: how many matrices of one expert the slice takes channels from: gate and up projections are two.
    """

    name: str
    weight: Tensor
    part: Slice
    module: nn.Module
    axis: int | None = None
    matrices: int = 1

    def by_unit(self, tensor: Tensor) -> Tensor:
        """(units, entries) the part of ``tensor``, shaped like the weight, that goes with each unit."""
        if self.axis is None:
            return by_unit(self.module, tensor, self.part)
        return tensor.movedim(self.axis, 0)[self.part.channels.to(tensor.device)].flatten(1)

    def of_matrices(self, value: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """:meth:`by_unit` of ``value``, a function of matrices that returns one, applied to each matrix on its own.

        A layer's weight is one matrix. In a tensor of experts each gate, up and down projection is one, (units,
        entries); a down projection is transposed.
        """
        if self.axis is None:
            return self.by_unit(value(*tensors))
        found = []
        for places in self.part.channels.chunk(self.matrices, 1):
            rows = [tensor.movedim(self.axis, 0)[places.flatten().to(tensor.device)] for tensor in tensors]
            for expert in range(rows[0].shape[1]):
                found.append(value(*(one[:, expert] for one in rows)).unflatten(0, tuple(places.shape)).flatten(1))
        return torch.cat(found, 1)


def slice_weights(group: ChannelGroup, model: nn.Module) -> list[SliceWeight]:
    """The weights of the group's slices; none if one is in a tensor of experts whose layout is not understood."""
    modules = dict(model.named_modules())
    found: list[SliceWeight] = []
    for part in group.slices:
        own = _weights_of(part, modules, group.kind)
        if own is None:
            return []
        found += own
    return found


def _weights_of(part: Slice, modules: dict[str, nn.Module], kind: str) -> list[SliceWeight] | None:
    """The weights of one slice, empty for norms and other tensors; None for experts that are not understood."""
    module = modules.get(part.module)
    owner, _, key = part.module.rpartition(".")
    if module is not None and (weight := weight_of(module)) is not None:
        return [SliceWeight(part.module, weight, part, module)]
    if module is None and owner in modules:
        return _of_tensor(part, modules[owner], key, part.channels.shape[1] if kind == "expert_ffn" else 1)
    if module is None:
        return []
    if both := expert_weights(module):
        keys = [DOWN] if part.side == "in" else both
        return [_fused(f"{part.module}.{one}", part, module, one, whole=part.side == "out") for one in keys]
    weight = module._parameters.get("weight")
    if weight is None:
        return []
    if _holds_experts(module):  # JetMoE: a whole expert's weights are in two modules, of which the slice names one
        return [SliceWeight(part.module, weight.detach(), part, module, axis=2)] if part.side == "in" else None
    if kind == "experts" and weight.dim() == 2:
        return [SliceWeight(part.module, weight.detach(), part, module, axis=0)]
    return []


def _of_tensor(part: Slice, owner: nn.Module, key: str, matrices: int) -> list[SliceWeight]:
    """The weight of a slice that names a tensor: gate and up projections, or JetMoE's first weight."""
    tensor = owner._parameters.get(key)
    if tensor is None or tensor.dim() != 3 or part.side != "out":
        return []
    if key != DOWN and key in expert_weights(owner):
        return [_fused(part.module, part, owner, key, matrices=matrices)]
    if key == "weight" and _holds_experts(owner):
        name = part.module.rpartition(".")[0]
        return [SliceWeight(name, tensor.detach(), part, owner, axis=1, matrices=matrices)]
    return []


def _holds_experts(module: nn.Module) -> bool:
    """Whether its own weight is (experts, outputs, inputs), as in JetMoE."""
    rule = rule_for(module)
    return isinstance(rule, Rule) and rule.kind == "weight" and getattr(module, rule.weight).dim() == 3


def _fused(name: str, part: Slice, module: nn.Module, key: str, whole: bool = False, matrices: int = 1) -> SliceWeight:
    up, down = (weight.detach() for weight in experts_of(module))
    inner = 2 if is_transposed(up, down) == (key != DOWN) else 1
    return SliceWeight(name, down if key == DOWN else up, part, module, 0 if whole else inner, matrices)
