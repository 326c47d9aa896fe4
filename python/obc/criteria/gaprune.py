"""GAPrune: what matters more to one domain than to general text, from the rows of two sets of batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from obc.criteria.protocol import About, CriterionError, GroupScores, MeasuredCriterion
from obc.criteria.rows import read_rows
from obc.criteria.scoring import collected
from obc.criteria.slices import slice_weights
from obc.criteria.subject import Subject
from obc.criteria.units import TINY, standardised
from obc.model.evaluation import LossFn
from obc.model.groups import ChannelGroup, Sided
from obc.model.usable_batches import UsableBatches
from obc.statistics.weight_gradients import WeightGradients, WeightGradientSums

_EPSILON = 1e-8  # as in the published code


class GAPrune(MeasuredCriterion):
    """S_u = (sum r_dom^2 - beta sum r_gen^2) clip(1 + 0.2 cos, 0.8, 1.2), with r from two sets of batches.

    GAPrune (code yixuantt/GAPrune) for units instead of weights: the domain's importance minus the general one, and the
    cosine of the two mean rows over the unit's channels.

    The code scores single weights. F is the mean over batches of g^2 for each domain, g_d its mean gradient divided by
    its norm in the matrix, and a the mean of g_dom * g_gen over 3 x 3 neighbouring weights:

        softplus((F_dom - beta F_gen) |w| clip(1 + 0.2 a, 0.8, 1.2) + magnitude sqrt|w|)

    standardised within the matrix, then through a sigmoid. With ``code=True`` a unit's score is the mean over its
    weights in all slices; this needs weight gradients, and batches of one sample to get the code's F. Each projection
    of each expert is a matrix; whole experts are not scored, because scores are comparable within a matrix only.

    Args:
        general: batches of general data, used once per scoring; the domain's batches are those of ``obc.prune``.
        general_loss: loss for these batches; by default the same.
        beta: weight of the general importance.
        code: score single weights as the published code does.
        magnitude: weight of sqrt|w|; only with ``code``.
    """

    name = "gaprune"
    reads_parameters = True
    about = About(
        "GAPrune",
        "arXiv 2509.10844; code yixuantt/GAPrune",
        "(sum r_dom^2 - beta sum r_gen^2) clip(1 + 0.2 cos(mean r_dom, mean r_gen), 0.8, 1.2)",
        "labels",
        kinds="all that have rows",
        differs="its code scores single weights, with softplus and a magnitude term: code=True takes a unit's mean, of "
        "channels and heads",
    )
    per_cost = False

    def __init__(
        self,
        general: Iterable[Any] | None = None,
        general_loss: LossFn | None = None,
        beta: float = 1.0,
        code: bool = False,
        magnitude: float = 0.5,
    ) -> None:
        self.general, self.general_loss, self.beta = general, general_loss, beta
        self.code, self.magnitude = code, magnitude

    def measure(self, subject: Subject) -> GroupScores:
        """(units,) per group, from rows, or with ``code`` from weight gradients, of both sets of batches."""
        if self.general is None:
            raise CriterionError("it compares two domains: pass criterion=obc.criteria.GAPrune(general=batches)")
        loss = self.general_loss or subject.loss_fn
        general = replace(subject, batches=UsableBatches.of(self.general), loss_fn=loss)
        return self._of_weights(subject, general) if self.code else self._of_rows(subject, general)

    def _of_rows(self, subject: Subject, other: Subject) -> GroupScores:
        domain, general = read_rows(subject).rows, read_rows(other).rows
        found: GroupScores = {}
        for group in subject.groups:
            dom, gen = group.gate_rows(domain), group.gate_rows(general)
            if dom is None or gen is None:
                continue
            importance = dom.double().square().sum(0) - self.beta * gen.double().square().sum(0)
            align = _cosine(_mean_channels(group, domain), _mean_channels(group, general))
            found[group.name] = importance * (1 + 0.2 * align).clamp(0.8, 1.2)
        return found

    def _of_weights(self, subject: Subject, other: Subject) -> GroupScores:
        both = [collected([WeightGradients(square=True)], (), one) for one in (subject, other)]
        found: GroupScores = {}
        for group in subject.groups:
            if group.kind == "experts":  # standardised each by itself, all of their matrices score about the same
                continue
            parts = []
            for one in slice_weights(group, subject.model):
                sums = [s.weight_gradients[one.name] for s in both if one.name in s.weight_gradients]
                if len(sums) == len(both):
                    parts.append(one.of_matrices(self._importance, one.weight.double().cpu(), *_means(sums)))
            if parts:
                found[group.name] = torch.cat(parts, 1).mean(1)
        return found

    def _importance(self, weight: Tensor, *means: Tensor) -> Tensor:
        """The published code's importance of every weight of one matrix, from :func:`_means`."""
        units = [(mean / (mean.norm() + _EPSILON)).flatten(1) for mean in means[::2]]
        domain, general = (fisher + _EPSILON for fisher in means[1::2])
        align = F.avg_pool2d((units[0] * units[1])[None], 3, stride=1, padding=1)[0].view_as(weight)
        information = (domain - self.beta * general) * weight.abs() * (1 + 0.2 * align).clamp(0.8, 1.2)
        raw = F.softplus(information + self.magnitude * (weight.abs() + _EPSILON).sqrt())
        return standardised(raw.flatten(), correction=1).sigmoid().view_as(weight)


def _means(both: Sequence[WeightGradientSums]) -> list[Tensor]:
    """The mean gradient and the mean of its square of each domain, shaped like the weight."""
    found = []
    for sums in both:
        assert sums.square is not None
        found += [sums.total.double().cpu() / sums.count, sums.square.double().cpu() / sums.count]
    return found


def _mean_channels(group: ChannelGroup, rows: Mapping[str, Sided]) -> Tensor:
    """(units, all channels of a unit that gates read) the mean row of each channel."""
    parts = []
    for part in group.gates:
        if part.module in rows:
            sided = rows[part.module]
            values = sided.in_channels if part.side == "in" else sided.out_channels
            assert values is not None
            parts.append(values.double().mean(0)[part.channels.to(values.device)])
    return torch.cat(parts, 1)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(TINY)
