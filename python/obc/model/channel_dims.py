"""Where the channels of a module lie in each of its tensors, as slicing, costs and the blocks of transformers need it.

torch's recurrent layers have two sides, too: their inputs, and the hidden units. A hidden unit is one number of the
state: unit j is the j-th of every layer and direction at once, because torch gives all of them one ``hidden_size``. It
has a row in every gate's block of ``weight_ih``, ``weight_hh`` and the biases of all layers, a column in every
``weight_hh``, and a column for each direction in the ``weight_ih`` of the next layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from obc.model.groups import Side
from obc.model.layouts import layout_of
from obc.model.recurrent import is_recurrent
from obc.model.rules import Rule

_GATES = {"LSTM": 4, "GRU": 3}


class ChannelDim(NamedTuple):
    """The channels along one dimension of a tensor.

    Attributes:
        side: the module's side that they belong to.
        copies: entries of each channel, in as many stretches of all channels: the gates of a recurrent layer.
        groups: conv groups; the dimension holds the channels of one.
    """

    side: Side
    copies: int = 1
    groups: int = 1

    def channels(self, length: int) -> int:
        """The number of channels if the dimension has ``length`` entries."""
        return length * self.groups // self.copies

    def entries(self, channels: Tensor, length: int) -> Tensor:
        """The entries of these channels in a dimension of ``length`` entries, without conv groups."""
        return torch.cat([channels + copy * (length // self.copies) for copy in range(self.copies)])


def channel_dims(module: nn.Module, name: str, tensor: Tensor, weight: Tensor | None) -> dict[int, ChannelDim] | None:
    """Dimension -> the channels along it, for a module's own tensor ``name``; empty if it has no channels.

    None if it is not known how a tensor belongs to the channels: of a linear or convolutional layer those, beside
    weight and bias, with neither the weight's shape nor one value per out channel; of an LSTM those with projections.

    Of a depthwise convolution the channels are those of side "out" alone; its sizes don't tell it from a grouped one.

    Args:
        module: the module; one without a rule has the channels of a norm or embedding, along the last dimension.
        name: the tensor's name in the module.
        tensor: the tensor.
        weight: the module's ``weight``, before or after pruning like ``tensor``.
    """
    return _dims(module, layout_of(module), name, tensor, weight)


def _dims(
    module: nn.Module, layout: Rule | None, name: str, tensor: Tensor, weight: Tensor | None
) -> dict[int, ChannelDim] | None:
    if layout is not None and name != "bias" and weight is not None:
        if tensor.shape != weight.shape:
            return _beside_layer(layout, weight, tensor)
        return {dim: ChannelDim(side, 1, layout.groups if dim == 1 else 1) for dim, side in _sides(layout).items()}
    if isinstance(module, nn.RNNBase):
        return _recurrent(module, name) if is_recurrent(module) else None
    if isinstance(module, nn.MultiheadAttention):
        if name == "in_proj_weight":
            return {0: ChannelDim("out"), 1: ChannelDim("in")}
        return {tensor.dim() - 1: ChannelDim("in" if name in ("bias_k", "bias_v") else "out")}
    dim = _dim_beside(name, tensor, weight)
    return {} if dim is None else {dim: ChannelDim("out")}


def dims_of_side(module: nn.Module, side: Side) -> Iterator[tuple[str, int, ChannelDim]]:
    """(name of a tensor, dimension, the channels along it) for each of a module's tensors with channels of a side."""
    layout, weight = layout_of(module), getattr(module, "weight", None)
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        dims = None if tensor is None else _dims(module, layout, name, tensor, weight)
        yield from ((name, dim, along) for dim, along in (dims or {}).items() if along.side == side)


def _beside_layer(layout: Rule, weight: Tensor, tensor: Tensor) -> dict[int, ChannelDim] | None:
    """The dimensions of a tensor that a linear or convolutional layer has beside weight and bias.

    Such tensors of subclasses are masks and scales: with one dimension of as many entries as the layer has out
    channels, or with several dimensions that broadcast to the weight's shape, or without channels. None for any other
    shape: one value per in channel is no longer told apart once pruning makes both sides equally wide.
    """
    wide = [dim for dim, size in enumerate(tensor.shape) if size > 1]
    aligned = tensor.dim() == weight.dim()
    if len(wide) == 1 and not (aligned and wide[0] > 1):
        return {wide[0]: ChannelDim("out")} if tensor.shape[wide[0]] == layout.sizes(weight)[0] else None
    fits = aligned and all(size in (1, whole) for size, whole in zip(tensor.shape, weight.shape, strict=True))
    if (not fits and wide) or (layout.groups > 1 and layout.in_axis in wide):
        return None
    return {dim: ChannelDim(side) for dim, side in _sides(layout).items() if dim in wide}


def _sides(layout: Rule) -> dict[int, Side]:
    return {0: "in", 1: "out"} if layout.transposed else {0: "out", 1: "in"}


def _recurrent(module: nn.RNNBase, name: str) -> dict[int, ChannelDim]:
    rows = {0: ChannelDim("out", _GATES.get(module.mode, 1))}
    if not name.startswith("weight"):
        return rows
    if name.startswith("weight_ih_l0"):
        return rows | {1: ChannelDim("in")}
    both_directions = module.bidirectional and not name.startswith("weight_hh")
    return rows | {1: ChannelDim("out", 2 if both_directions else 1)}


def channel_axis(tensor: Tensor, size: int) -> int | None:
    """The only dimension of a tensor with ``size`` entries, one for each channel; None if it has no such dimension.

    Raises:
        ValueError: it has several.
    """
    axes = [dim for dim, length in enumerate(tensor.shape) if length == size]
    if len(axes) > 1:
        raise ValueError(f"which of its dimensions {tuple(tensor.shape)} belongs to the {size} channels is not known")
    return axes[0] if axes else None


def _dim_beside(name: str, tensor: Tensor, weight: Tensor | None) -> int | None:
    """The dimension of channels of the tensor ``name`` of a norm, or of a layer's bias; None if it has no channels.

    Beside a weight with one value per channel, tensors have channels where they are as long; counters and tables are
    not.
    """
    if not tensor.dim():
        return None
    if name in ("weight", "bias") or weight is None or weight.dim() != 1:
        return tensor.dim() - 1
    return channel_axis(tensor, len(weight))
