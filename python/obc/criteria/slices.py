"""The weight that a slice of a group takes entries from, a layer's or one of all experts, times its gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from obc.criteria.units import by_unit, weight_of
from obc.model.experts import DOWN, GATE_UP, fused_experts, is_transposed
from obc.model.groups import Slice
from obc.statistics.results import Statistics


@dataclass(frozen=True, eq=False)
class SliceWeight:
    """The weight of one slice.

    Attributes:
        name: name of the weight in statistics: the layer's, or the experts' tensor's.
        weight: the weight, without gradient.
        part: the slice.
        module: the layer, or the mixture.
        axis: dimension of the slice's channels in a tensor of experts; None for a layer.
    """

    name: str
    weight: Tensor
    part: Slice
    module: nn.Module
    axis: int | None = None

    def by_unit(self, tensor: Tensor) -> Tensor:
        """(units, entries) the part of ``tensor``, shaped like the weight, that goes with each unit."""
        if self.axis is None:
            return by_unit(self.module, tensor, self.part)
        return tensor.movedim(self.axis, 0)[self.part.channels.to(tensor.device)].flatten(1)


def slice_weight(part: Slice, model: nn.Module) -> SliceWeight | None:
    """The slice's weight; None for slices of norms, routers, whole experts and other tensors."""
    modules = dict(model.named_modules())
    module = modules.get(part.module)
    if module is not None and (weight := weight_of(module)) is not None:
        return SliceWeight(part.module, weight, part, module)
    if module is None:
        owner, _, key = part.module.rpartition(".")
        module = modules.get(owner)
        if key != GATE_UP or part.side != "out" or module is None:
            return None
        name = part.module
    else:
        key, name = DOWN, f"{part.module}.{DOWN}"
    experts = fused_experts(module)
    if experts is None or (key == DOWN and part.side != "in"):
        return None
    gate_up, down = (weight.detach() for weight in experts)
    last = is_transposed(gate_up, down) == (key == GATE_UP)
    return SliceWeight(name, gate_up if key == GATE_UP else down, part, module, axis=2 if last else 1)


@dataclass(frozen=True, eq=False)
class Products:
    """Weight times gradient over one slice, (units, entries) float64 on the CPU.

    Attributes:
        first: w g.
        second: w^2 sum g_n^2; zero if squares were not collected.
        count: how many gradients were added up.
    """

    first: Tensor
    second: Tensor
    count: int


def products(part: Slice, statistics: Statistics, model: nn.Module) -> Products | None:
    """The products of one slice; None for slices without a gradient."""
    found = slice_weight(part, model)
    if found is None or found.name not in statistics.weight_gradients:
        return None
    sums, weight = statistics.weight_gradients[found.name], found.weight
    first = found.by_unit(weight * sums.total).double().cpu()
    if sums.square is None:
        return Products(first, torch.zeros_like(first), sums.count)
    return Products(first, found.by_unit(weight.square() * sums.square).double().cpu(), sums.count)
