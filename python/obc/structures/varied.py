"""Varies parameters and inputs that have a single value, because these could hide what comes before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from obc.model.held_tensors import register_held
from obc.model.layouts import loose_buffers
from obc.model.shared_copy import parameter_uses, replace_parameter, shared_copy


def varied_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose single-valued parameters are random around their value, so that none hides a fault.

    So are the buffers that pruning may cut (:func:`obc.model.layouts.loose_buffers`). Tensors that modules hold as
    plain attributes are buffers of the copy.
    """
    varied = shared_copy(model)
    uses = parameter_uses(varied.modules())
    generator = torch.Generator().manual_seed(0)
    for parameter in list({id(p): p for p in varied.parameters()}.values()):
        if parameter.is_floating_point() and parameter.numel() > 1 and _is_constant(parameter.detach()):
            replace_parameter(uses, parameter, _vary(parameter.detach(), generator))
    for module in varied.modules():
        for key, buffer in loose_buffers(module):
            if _is_constant(buffer):
                module._buffers[key] = _vary(buffer, generator)
    register_held(varied)
    return varied


def varied_inputs(inputs: Any) -> Any:
    """Example inputs whose single-valued floating tensors are random around their value."""
    generator = torch.Generator().manual_seed(0)

    def leaf_samples(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() > 1 and _is_constant(leaf.detach()):
            return _vary(leaf.detach(), generator)
        return leaf

    return pytree.tree_map(leaf_samples, inputs)


def _is_constant(tensor: Tensor) -> bool:
    """Whether all entries are equal; the last is compared first, which usually decides. Sparse tensors are not."""
    if tensor.layout is not torch.strided:
        return False
    first = tensor[(0,) * tensor.dim()]
    return bool(first == tensor[(-1,) * tensor.dim()]) and bool((tensor == first).all())


def _vary(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Between half and one and a half times the value; for zeros, normal with the size of a fresh layer's weights."""
    noise = torch.rand(tensor.shape, generator=generator, device="cpu").to(tensor)
    if bool(tensor.any()):
        return tensor * (0.5 + noise)
    normal = torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor)
    fan_in = tensor[0].numel() if tensor.dim() > 1 else 4
    return normal / fan_in**0.5
