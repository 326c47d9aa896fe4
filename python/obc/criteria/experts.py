"""Criteria of whole experts: REAP, frequency, activation norms. They need forward passes only.

A unit of several experts, one of every group that a router first chooses among, scores the sum over them.
"""

from __future__ import annotations

import logging

from torch import Tensor, nn

from obc.criteria.protocol import About, Criterion
from obc.model.groups import ChannelGroup
from obc.statistics.experts import Experts, ExpertSums, Gates
from obc.statistics.results import Statistics

logger = logging.getLogger("obc")


class ExpertCriterion(Criterion):
    """A criterion of the tokens routed to each expert; experts without tokens score 0 and are named.

    Args:
        gates: which g to use, see :class:`obc.statistics.Experts`.
    """

    allocation = "uniform"
    per_cost = False

    def __init__(self, gates: Gates = "routed") -> None:
        self.needs = (Experts(gates),)

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        """(units,) the sum over each unit's experts; None for groups of other kinds."""
        if group.kind != "experts":
            return None
        found = next((statistics.experts[s.module] for s in group.slices if s.module in statistics.experts), None)
        if found is None:
            return None
        unreached = (found.count == 0).nonzero().flatten().tolist()
        if unreached:
            logger.warning(
                "%s: no token reached experts %s, which score 0; pass more batches", group.name, str(unreached)[1:-1]
            )
        experts = group.slices[-1].channels.to(found.count.device)
        return self.of_experts(found)[experts].sum(1)

    def of_experts(self, sums: ExpertSums) -> Tensor:
        """(experts,) scores from the sums over the tokens routed to each expert."""
        raise NotImplementedError


class REAP(ExpertCriterion):
    """S_e = mean over the tokens routed to e of g_e |f_e(x)|_2 (REAP, code CerebrasResearch/reap)."""

    name = "reap"
    about = About(
        "REAP",
        "arXiv 2510.13999; code CerebrasResearch/reap",
        "mean over routed tokens of g_e |f_e(x)|_2",
        "forward",
        kinds="experts",
        differs="its code takes g from a softmax over all experts: gates='softmax'; it runs all experts on every token",
        missing="keeping 'super experts' by their largest activation",
    )

    def of_experts(self, sums: ExpertSums) -> Tensor:
        """(experts,) the mean of g |f(x)|_2; 0 for an expert without tokens."""
        return sums.gate_norm / sums.count.clamp_min(1)


class ExpertFrequency(ExpertCriterion):
    """S_e = number of tokens routed to e (Z-code's expert pruning by utilisation, and a baseline of REAP's)."""

    name = "expert_frequency"
    about = About("expert frequency, Z-code", "code CerebrasResearch/reap", "tokens routed", "forward", kinds="experts")

    def of_experts(self, sums: ExpertSums) -> Tensor:
        """(experts,) the number of tokens."""
        return sums.count


class ExpertNorm(ExpertCriterion):
    """S_e = sum over the tokens routed to e of |f_e(x)|_2 ("EAN", a baseline of REAP's)."""

    name = "expert_norm"
    about = About("EAN", "code CerebrasResearch/reap", "sum over routed tokens of |f_e|_2", "forward", kinds="experts")

    def of_experts(self, sums: ExpertSums) -> Tensor:
        """(experts,) the sum of |f(x)|_2."""
        return sums.norm
