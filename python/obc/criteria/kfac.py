"""K-FAC: the compensated Jacobian Criterion in its form, and Optimal Brain Surgeon in the metric of the loss.

The latter is the change of the loss if a unit goes and others take over.

With F = E over rows of the sum over positions of g g^T, g = dL/dy at a consumer's output y, G the second moment of its
input and P = (G + lambda I)^-1, a change D of the weight changes the loss, to second order and with positions taken as
independent, by tr(F D G D^T). An expert's positions are the tokens routed to it, and y is its output before the gate,
so that F has the gate's square. Optimal Brain Surgeon of the weight F^(1/2) W is therefore that of the loss:

    e_u = tr(W_u (P_uu)^-1 W_u^T F),        W' = W - W_u (P_uu)^-1 P_u:

The update is that of Optimal Brain Surgeon: F decides which units go, and makes the errors of different layers
comparable. Positions are not independent: a global average pooling gives all of them the same gradient. Each group's
scores are therefore multiplied by the ratio

    sum over u of E (sum over positions of (P_uu)^-1 (P x)_u . dL/dx_u)^2   /   sum over u of e_u.

The numerator is the Jacobian Criterion of the error that is left when a single unit is removed; it adds positions up
before it squares them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from obc.criteria.obs import OBS
from obc.criteria.output_metrics import OutputMetrics, in_metric
from obc.criteria.protocol import About, Criterion, GroupScores, MeasuredCriterion
from obc.criteria.residual_rows import read_residuals
from obc.criteria.residuals import Residuals, free_of_means
from obc.criteria.scoring import collected
from obc.criteria.subject import Subject
from obc.criteria.surgeon import ConsumerState, inverse, second_moment
from obc.criteria.units import TINY, consumers_of, have_consumers, sum_over
from obc.model.groups import ChannelGroup
from obc.statistics.gram import Gram, GramSum, Held
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
        return sum_over(parts)


# Neighbouring positions are similar: about this many of them are worth one that is drawn independently.
_POSITIONS_OF_ONE = 10
_SMALLEST_RIDGE = 1e-2


class KFACOBS(MeasuredCriterion):
    """e_u = sum over consumers of tr(W_u (P_uu)^-1 W_u^T F), greedy: units go one by one, as in "obs".

    Two runs: forward passes for G, then forward and backward for F and the factors. F takes 8 out^2 bytes a consumer.
    Meant for compensation, and for units whose consumers write a residual stream: expansion channels, feed-forward
    channels, heads.

    Args:
        ridge: lambda, relative to the mean diagonal of G. None: 0.01 + 10 in / n for a layer with ``in`` channels that
            saw n positions: with few samples, layers with few positions (the last ones of a convolutional network)
            look more redundant than they are.
        centred: G is the covariance: the mean of what goes costs nothing. None: where the consumer has a bias, or a
            BatchNorm alone reads its output, whose statistics ``obc.prune`` estimates anew.
        factors: whether positions count together, by the factors above.
    """

    name = "kfac_obs"
    about = About(
        "Optimal Brain Surgeon in the metric of the loss",
        "obc; Kronecker factors: arXiv 1503.05671; greedy removal: arXiv 2302.04089",
        "tr(W_u (P_uu)^-1 W_u^T F), F = E sum over positions of g g^T, g = dL/dy; greedy with updates",
        "labels",
    )
    update = "ls"

    def __init__(self, ridge: float | None = None, centred: bool | None = None, factors: bool = True) -> None:
        self.ridge, self.centred, self.factors = ridge, centred, factors

    def measure(self, subject: Subject) -> GroupScores:
        """(units,) per group: the saliency of a unit when the greedy order removes it."""
        if not have_consumers(subject.groups, subject.model):
            return {}
        statistics, free = collected([Gram()], (), subject), free_of_means(subject)
        taps, grams, ridges = [], dict[str, Tensor](), dict[str, float]()
        for group in subject.groups:
            for consumer in consumers_of(group, subject.model):
                if consumer.name in statistics.gram:
                    centred = consumer.name in free if self.centred is None else self.centred
                    ridges[consumer.name] = ridge = self._ridge(statistics.gram[consumer.name])
                    taps.append(Residuals.of(group.name, consumer, statistics, ridge, centred))
                    grams[consumer.name] = second_moment(consumer, statistics, centred, share=False)
        metrics = OutputMetrics([tap.consumer for tap in taps])
        rows = read_residuals(subject, taps, also=metrics)
        found = {}
        for group in subject.groups:
            states = [
                ConsumerState.of(in_metric(tap.consumer, metrics.mean(name)), grams[name], ridges[name])
                for tap in taps
                if tap.group == group.name and (name := tap.consumer.name) in metrics.sums
            ]
            if not states:
                continue
            factor = 1.0
            if self.factors:
                together = float(rows[group.name].double().square().mean(0).sum())
                apart = float(torch.stack([state.errors() for state in states]).sum())
                factor = together / max(apart, TINY)
            found[group.name] = OBS().scores_from(states, group.size) * factor
        return found

    def _ridge(self, gram: GramSum) -> float:
        return _SMALLEST_RIDGE + _POSITIONS_OF_ONE * len(gram.sum) / gram.count if self.ridge is None else self.ridge
