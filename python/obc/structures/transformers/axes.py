"""The location of a slice in a model: tensors and their dimensions, and how removals are recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from obc.model.groups import Side
from obc.model.kept import Kept
from obc.model.layouts import is_depthwise, layout_of


@dataclass(frozen=True)
class Axis:
    """One dimension of one tensor.

    Attributes:
        module: name of the module that owns the tensor.
        tensor: name of the tensor in the module.
        dim: the dimension.
        key: the plan's key for it.
        slot: the side of the plan's entry.
        raw: the tensor is not an ordinary layer's, so the plan's entry names the dimension.
    """

    module: str
    tensor: str
    dim: int
    key: str
    slot: Side
    raw: bool = True


def layer_axes(name: str, module: nn.Module, side: Side) -> tuple[Axis, ...]:
    """The axes of one side of an ordinary layer: linear, convolution, norm or embedding."""
    if isinstance(module, _NormBase):  # with statistics per channel
        tensors = {**module._parameters, **module._buffers}
        names = [key for key, tensor in tensors.items() if tensor is not None and tensor.dim() == 1]
        return tuple(Axis(name, key, 0, name, "out", raw=False) for key in names)
    layout, weight = layout_of(module), module.weight
    assert isinstance(weight, Tensor)
    bias: tuple[Axis, ...] = ()
    if side == "out" and isinstance(own := getattr(module, "bias", None), Tensor):
        bias = (Axis(name, "bias", own.dim() - 1, name, "out", raw=False),)
    if layout is None:
        return (Axis(name, "weight", weight.dim() - 1, name, "out", raw=False), *bias)
    if is_depthwise(module):
        return (Axis(name, "weight", 0, name, "out", raw=False), *bias)
    dim = 0 if (side == "out") != layout.transposed else 1
    return (Axis(name, "weight", dim, name, side, raw=False), *bias)


def narrow(kept: Mapping[str, Kept], axis: Axis, size: int, removed: Tensor) -> Kept:
    """The plan's entry of an axis after the positions ``removed`` of its ``size`` were removed."""
    before, dim = kept.get(axis.key, Kept()), axis.dim if axis.raw else None
    if axis.slot == "out":
        return replace(before.narrowed_out(size, removed), dim=dim)
    return replace(before.narrowed_in(size, removed), in_dim=dim)


def axis_key(axis: Axis) -> tuple[str, int]:
    """(parameter name, dimension), equal for axes that lie in the same dimension."""
    return f"{axis.module}.{axis.tensor}" if axis.module else axis.tensor, axis.dim
