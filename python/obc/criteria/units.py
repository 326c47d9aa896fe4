"""The weights and statistics of a group's units, for criteria."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from obc.model.experts import DOWN, fused_experts, projection
from obc.model.groups import ChannelGroup, Slice
from obc.model.layouts import layout_of
from obc.statistics.routed import expert_name
from obc.statistics.weight_gradients import floating_weight

# Divisors that could vanish are at least this.
TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True, eq=False)
class Consumer:
    """One layer that reads a group's channels.

    Attributes:
        name: name of the module; for one expert of a fused mixture, such as "mlp.experts[3]".
        module: the layer or the mixture.
        channels: (units, k) int64 on the CPU: its in channels that go with each unit.
        columns: (in, entries) float64 on the CPU: the weight's entries for each in channel. The entries of one column
            are outputs, for convolutions every output and tap.
        expert: number of an expert of a fused mixture, which has no statistics if no token reached it.
    """

    name: str
    module: nn.Module
    channels: Tensor
    columns: Tensor
    expert: int | None = None

    @property
    def routed(self) -> bool:
        """Whether it is an expert: its positions are the tokens routed to it."""
        return self.expert is not None

    @property
    def groups(self) -> int:
        """Number of conv groups: channels of different groups reach different outputs."""
        layout = layout_of(self.module)
        return 1 if layout is None else layout.groups

    @property
    def has_bias(self) -> bool:
        """Whether a bias can absorb the mean of the removed channels."""
        if self.expert is not None:
            return projection(self.module, DOWN, self.expert)[1] is not None
        return isinstance(getattr(self.module, "bias", None), Tensor)

    @property
    def square(self) -> Tensor:
        """(in,) |W_:j|^2."""
        return self.columns.square().sum(1)


def consumers_of(group: ChannelGroup, model: nn.Module) -> Iterator[Consumer]:
    """The group's consumers that are linear layers or convolutions with floating weights, and fused experts."""
    modules = dict(model.named_modules())
    for part in group.consumers:
        module = modules.get(part.module)
        if part.side == "in" and module is not None and (experts := fused_experts(module)) is not None:
            for expert in range(len(experts[1])):
                columns = projection(module, DOWN, expert)[0].detach().mT.double().cpu()
                yield Consumer(expert_name(part.module, expert), module, part.channels.cpu(), columns, expert)
        elif part.side == "in" and module is not None and layout_of(module) is not None:
            weight = floating_weight(module)
            if weight is not None:
                columns = by_channel(module, weight.detach(), "in").double().cpu()
                yield Consumer(part.module, module, part.channels.cpu(), columns)


def have_consumers(groups: Sequence[ChannelGroup], model: nn.Module) -> bool:
    """Whether any of the groups has a consumer, as whole experts and blocks have none."""
    modules = dict(model.named_modules())
    readers = [modules.get(part.module) for group in groups for part in group.consumers if part.side == "in"]
    return any(one is not None and (fused_experts(one) or layout_of(one)) for one in readers)


def by_channel(module: nn.Module, tensor: Tensor, side: str) -> Tensor:
    """(channels, entries) of a tensor shaped like the layer's weight, by the channels of one side."""
    layout = layout_of(module)
    transposed, groups = (False, 1) if layout is None else (layout.transposed, layout.groups)
    if (side == "in") != transposed:  # dim 1 holds one conv group's channels, and each group has its own
        tensor = tensor.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return tensor.flatten(1)


def by_unit(module: nn.Module, tensor: Tensor, part: Slice) -> Tensor:
    """(units, entries) the part of ``tensor``, shaped like the layer's weight, that goes with each unit."""
    return by_channel(module, tensor, part.side)[part.channels.to(tensor.device)].flatten(1)


def mean_over(values: Iterable[Tensor]) -> Tensor | None:
    """The mean of (units,) values; None if there are none."""
    parts = [one.double().cpu() for one in values]
    return torch.stack(parts).mean(0) if parts else None


def sum_over(values: Iterable[Tensor]) -> Tensor | None:
    """The sum of (units,) values; None if there are none."""
    parts = list(values)
    return torch.stack(parts).sum(0) if parts else None


def sum_over_consumers(
    group: ChannelGroup, model: nn.Module, value: Callable[[Consumer], Tensor], read: Container[str]
) -> Tensor | None:
    """The sum over the consumers of (units,) values; experts that are not ``read``, without tokens, add nothing."""
    return sum_over(value(one) for one in consumers_of(group, model) if not one.routed or one.name in read)


def relative(scores: Tensor | None) -> Tensor | None:
    """Scores divided by their mean, as Torch-Pruning does to rank units of several groups by weights alone."""
    return None if scores is None else scores / scores.mean().clamp_min(TINY)


def standardised(values: Tensor, correction: int = 0) -> Tensor:
    """Values minus their mean, divided by their standard deviation, which uses n - correction."""
    deviation = values.std(correction=correction) if len(values) > 1 else values.new_ones(())
    return (values - values.mean()) / deviation.clamp_min(TINY)


def weight_of(module: nn.Module | None) -> Tensor | None:
    """The weight of a layer with slices on both sides."""
    weight = None if module is None else floating_weight(module)
    return None if weight is None else weight.detach()
