"""Where a module keeps its channels: the one description that slicing, folding and compensation share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True)
class Layout:
    """How a layer with out and in channels stores them.

    Attributes:
        transposed: the weight is (in, out / groups, *kernel) instead of (out, in / groups, *kernel).
        groups: groups of the convolution, 1 for a linear layer.
        convolution: whether its channels lie along dim 1 of its input and output; else along the last.
    """

    transposed: bool
    groups: int
    convolution: bool

    def sizes(self, weight: Tensor) -> tuple[int, int]:
        """(out channels, in channels) of ``weight``, the pruned layer's or the original's: grouping stays."""
        rows, columns = weight.shape[0], weight.shape[1] * self.groups
        return (columns, rows) if self.transposed else (rows, columns)


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of a linear or convolutional layer; None for every other module."""
    if isinstance(module, _ConvNd):
        return Layout(isinstance(module, _ConvTransposeNd), module.groups, True)
    if isinstance(module, nn.Linear):
        return Layout(False, 1, False)
    if _is_transformers_conv1d(module):
        return Layout(True, 1, False)
    return None


def _is_transformers_conv1d(module: nn.Module) -> bool:
    # By name: transformers must not be imported for it.
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def is_depthwise(module: nn.Module, original_weight: Tensor) -> bool:
    """One filter per channel: pruning it slices its filters and its groups together.

    The pruned module alone does not tell: a grouped convolution may end with one channel in each group.
    """
    return isinstance(module, _ConvNd) and module.groups == module.out_channels > 1 and original_weight.shape[1] == 1


def expand(channels: Tensor, repeat: int) -> Tensor:
    """Columns owned by ``channels`` where each owns ``repeat`` consecutive ones."""
    if repeat == 1:
        return channels
    return (channels[:, None] * repeat + torch.arange(repeat, device=channels.device)).flatten()


def split_by_group(channels: Tensor, size: int, groups: int) -> Tensor | None:
    """(groups, n) indices inside each group of ``size / groups`` channels; None where groups keep unequal numbers."""
    if size % groups or len(channels) % groups:
        return None
    local = channels.reshape(groups, -1)
    starts = torch.arange(groups, device=channels.device)[:, None] * (size // groups)
    local = local - starts
    inside = (local >= 0) & (local < size // groups)
    return local if bool(inside.all()) else None


def is_compiled(model: nn.Module) -> bool:
    """Whether ``model`` came from ``torch.compile`` or compiled itself. (Naming Dynamo's class would import Dynamo.)"""
    return "_orig_mod" in model._modules or model._compiled_call_impl is not None
