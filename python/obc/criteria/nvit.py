"""NViT: the squared sum over everything removed with a unit, minus the latency that this saves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from obc.criteria.protocol import About, Criterion
from obc.model.groups import ChannelGroup
from obc.model.latency_table import LatencyTable
from obc.statistics.results import Statistics
from obc.statistics.rows import Rows


class NViT(Criterion):
    """S_u = kind's weight x mean over n of (sum over all slices m of r_m,u[n])^2.

    NViT (Yang et al., arXiv 2110.04869; code NVlabs/NViT, method 23): the squared sum over everything removed with a
    unit, one row per batch.

    Args:
        weights: kind of units -> factor of r before squaring; the code uses 1/6 for heads, 1/12 for the embedding.
        latency: a table; ``eta`` times the milliseconds that the group's next unit saves is subtracted.
        eta: weight of the latency.
    """

    name = "nvit"
    about = About(
        "NViT",
        "arXiv 2110.04869; code NVlabs/NViT",
        "mean over n of (sum over all slices of w . dL_n/dw)^2 - eta x latency that a unit frees",
        "labels",
        kinds="all that have rows",
        differs="its code divides r by 6 for heads and by 12 for the embedding: weights=NViT.CODE_WEIGHTS",
        missing="momentum over steps; gate and up projections of experts that are one tensor have no rows",
    )
    needs = (Rows("all"),)
    CODE_WEIGHTS: Mapping[str, float] = {"heads": 1 / 6, "query_heads": 1 / 6, "embedding": 1 / 12}

    def __init__(
        self, weights: Mapping[str, float] | None = None, latency: LatencyTable | None = None, eta: float = 1.0
    ) -> None:
        self.weights, self.latency, self.eta = dict(weights or {}), latency, eta

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        """(units,) the weighted mean of squared rows, less eta times the milliseconds that a unit takes."""
        parts = list(group.parts(statistics.rows).values())
        if not parts:
            return None
        r = torch.stack(parts).double().sum(0) * self.weights.get(group.kind, 1.0)
        scores = r.square().mean(0)
        if self.latency is None:
            return scores
        seconds = self.latency.at(group.name, group.size) - self.latency.at(group.name, group.size - 1)
        return scores - self.eta * 1000 * seconds
