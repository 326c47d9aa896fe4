"""Weight times gradient over the slices of a group, for Taylor and Fisher criteria."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from obc.criteria.slices import slice_weights
from obc.model.groups import ChannelGroup
from obc.statistics.results import Statistics


@dataclass(frozen=True, eq=False)
class SliceProducts:
    """Weight times gradient over one slice, (units, entries) float64 on the CPU.

    Attributes:
        first: w g.
        second: w^2 sum g_n^2; zero if squares were not collected.
        count: how many gradients were added up.
    """

    first: Tensor
    second: Tensor
    count: int


def products(group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Iterator[SliceProducts]:
    """The products of the group's slices; slices without a gradient are left out, but no expert's."""
    found = slice_weights(group, model)
    if any(one.axis is not None and one.name not in statistics.weight_gradients for one in found):
        return
    for one in found:
        if one.name not in statistics.weight_gradients:
            continue
        sums, weight = statistics.weight_gradients[one.name], one.weight
        first = one.by_unit(weight * sums.total).double().cpu()
        second = torch.zeros_like(first)
        if sums.square is not None:
            second = one.by_unit(weight.square() * sums.square).double().cpu()
        yield SliceProducts(first, second, sums.count)
