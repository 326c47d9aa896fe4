"""GAPrune: what matters to one domain more than to text in general, from the rows of two sets of batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from obc.criteria.protocol import About, GroupScores, LossFn, MeasuredCriterion, Subject
from obc.criteria.rows import read_rows
from obc.criteria.units import TINY
from obc.model.groups import ChannelGroup, Sided
from obc.model.usable_batches import UsableBatches


class GAPrune(MeasuredCriterion):
    """S_u = (sum r_dom^2 - beta sum r_gen^2) clip(1 + 0.2 cos, 0.8, 1.2), with r of two sets of batches.

    GAPrune (code yixuantt/GAPrune) lifted from weights to units: the domain's importance less the general one, and the
    cosine of the two mean rows over the unit's channels.

    Args:
        general: batches of general data, passed over once a scoring; the domain's are those of ``obc.prune``.
        general_loss: their loss; by default the same.
        beta: of the general importance.
    """

    name = "gaprune"
    about = About(
        "GAPrune",
        "arXiv 2509.10844; code yixuantt/GAPrune",
        "(sum r_dom^2 - beta sum r_gen^2) clip(1 + 0.2 cos(mean r_dom, mean r_gen), 0.8, 1.2)",
        "labels",
        kinds="all that have rows",
        differs="published for single weights, with softplus and a magnitude term; here per unit, from rows",
    )
    per_cost = False

    def __init__(
        self, general: Iterable[Any] | None = None, general_loss: LossFn | None = None, beta: float = 1.0
    ) -> None:
        self.general, self.general_loss, self.beta = general, general_loss, beta

    def measure(self, subject: Subject) -> GroupScores:
        if self.general is None:
            raise ValueError("GAPrune compares two domains: pass criterion=obc.criteria.GAPrune(general=batches)")
        loss = self.general_loss or subject.loss_fn
        domain = read_rows(subject).rows
        general = read_rows(replace(subject, batches=UsableBatches.of(self.general), loss_fn=loss)).rows
        found: GroupScores = {}
        for group in subject.groups:
            dom, gen = group.gate_rows(domain), group.gate_rows(general)
            if dom is None or gen is None:
                continue
            importance = dom.double().square().sum(0) - self.beta * gen.double().square().sum(0)
            align = _cosine(_mean_channels(group, domain), _mean_channels(group, general))
            found[group.name] = importance * (1 + 0.2 * align).clamp(0.8, 1.2)
        return found


def _mean_channels(group: ChannelGroup, rows: Mapping[str, Sided]) -> Tensor:
    """(units, all consumers' channels of a unit) the mean row of each channel."""
    parts = []
    for part in group.consumers:
        if part.module in rows:
            sided = rows[part.module]
            values = sided.in_channels if part.side == "in" else sided.out_channels
            assert values is not None
            parts.append(values.double().mean(0)[part.channels.to(values.device)])
    return torch.cat(parts, 1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(TINY)
