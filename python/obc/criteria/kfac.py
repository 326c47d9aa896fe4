"""The K-FAC form of the compensated Jacobian Criterion."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from obc.criteria.protocol import About, Criterion
from obc.criteria.surgeon import inverse, second_moment
from obc.criteria.units import consumers_of
from obc.model.groups import ChannelGroup
from obc.statistics.gram import Gram, Held
from obc.statistics.results import Statistics


class KFAC(Criterion):
    """S_u = sum over consumers and channels c of u of [(P_uu)^-1]_cc E[g_c^2], g = dL/dx at the consumer's input.

    The compensated Jacobian Criterion with positions treated as independent: one run collects both statistics.

    Args:
        ridge: lambda, relative to the mean diagonal of E[x x^T].
        to: where the Gram matrices are held (:class:`obc.statistics.Gram`).
    """

    name = "kfac"
    about = About(
        "K-FAC form of the compensated Jacobian Criterion",
        "obc; Kronecker factors: arXiv 1503.05671",
        "sum over consumers of tr((P_uu)^-1 diag E g_u^2)",
        "labels",
    )
    update = "ls"

    def __init__(self, ridge: float = 1e-2, to: Held = "device") -> None:
        self.ridge, self.to = ridge, to
        self.needs = (Gram(to=to), "gradient_moments")

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        """(units,) the class's sum over consumers; None if no consumer was read."""
        parts = []
        for consumer in consumers_of(group, model):
            if consumer.name not in statistics.gram or consumer.name not in statistics.gradient_moments:
                continue
            inverted = inverse(second_moment(consumer, statistics, consumer.has_bias), self.ridge, consumer.name)
            blocks = inverted[consumer.channels[:, :, None], consumer.channels[:, None, :]]
            residual = torch.linalg.inv(blocks).diagonal(dim1=1, dim2=2)
            gradients = statistics.gradient_moments[consumer.name]
            parts.append((residual * (gradients.square.cpu() / gradients.count)[consumer.channels]).sum(1))
        return torch.stack(parts).sum(0) if parts else None
