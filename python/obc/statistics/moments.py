"""Moments of layers' inputs per channel, for FLAP, Wanda-sp, Minitron and CFSP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from obc import ops
from obc.statistics.part import Part
from obc.statistics.reader import Groups, InputReader, Reader
from obc.statistics.routed import RoutedInput
from obc.statistics.sums import Sums


@dataclass(frozen=True, eq=False)
class ChannelMoments:
    """Sums over the positions of one layer's input, per channel; tensors are (C,) float64.

    Attributes:
        count: n, the number of positions (tokens, pixels).
        samples: the number of samples with at least one position.
        sum: sum x.
        square: sum x^2.
        absolute: sum |x|.
        mean_absolute_square: sum over samples of (mean over the sample's positions of |x|)^2.
    """

    count: int
    samples: int
    sum: Tensor
    square: Tensor
    absolute: Tensor
    mean_absolute_square: Tensor

    @property
    def mean(self) -> Tensor:
        """E x."""
        return self.sum / self.count

    @property
    def variance(self) -> Tensor:
        """E x^2 - (E x)^2, at least 0."""
        return (self.square / self.count - self.mean.square()).clamp_min(0)


@dataclass(frozen=True)
class Moments:
    """Input moments of consumers: n, sum x, sum x^2, sum |x|, sum over samples of (mean |x|)^2. Forward only.

    For fused experts the inputs of the down projections are read, with every routed token as a sample, under names such
    as "mlp.experts[3]".
    """

    name: ClassVar[str] = "moments"
    backward: ClassVar[bool] = False

    def reader(self, model: nn.Module, groups: Groups, part: Part) -> Reader:
        """The reader of moments of the inputs of the groups' consumers."""
        return _Reader(Sums(self.name), part, model, groups)


class _Reader(InputReader):
    def read(
        self, name: str, x: Tensor, channel_dim: int, valid: Tensor | None, routed: RoutedInput | None
    ) -> dict[str, Tensor]:
        counts, sums = _moments(x, channel_dim, valid)
        return {"counts": counts, "sums": sums}

    def result(self, fields: Mapping[str, Tensor]) -> ChannelMoments:
        counts = [int(count) for count in fields["counts"].tolist()]
        return ChannelMoments(counts[0], counts[1], *fields["sums"].unbind())

    def bytes(self) -> int:
        total_bytes, batch_bytes = 8, 4
        return sum(4 * (total_bytes + batch_bytes) * width for width in self.widths.values())


def _moments(x: Tensor, channel_dim: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """(2,) float64: positions and samples that count; (4, C): the sums of :class:`ChannelMoments` over them.

    ``valid``, (B, T) bool, marks the positions that count of x (B, T, C) or (B * T, C); None counts all.
    """
    if valid is None:
        counts = torch.tensor([x.numel() // x.shape[channel_dim], x.shape[0]], dtype=torch.float64, device=x.device)
        return counts, torch.stack(ops.channel_moments(x, channel_dim))
    x = x.reshape(*valid.shape, x.shape[-1])
    positions = valid.sum(1)
    counts = torch.stack([positions.sum(), (positions > 0).sum()]).double()
    return counts, torch.stack(ops.channel_moments(x, -1, valid))
