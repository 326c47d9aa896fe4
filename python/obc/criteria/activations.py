"""Criteria from input moments: FLAP, Wanda-sp, Minitron, CFSP. They need forward passes only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from obc.criteria.protocol import About, Criterion, Needs
from obc.criteria.units import TINY, Consumer, standardised, sum_over_consumers
from obc.model.groups import ChannelGroup
from obc.selection.allocation import BlockProfile
from obc.statistics.moments import ChannelMoments
from obc.statistics.results import Statistics


class MomentCriterion(Criterion):
    """A criterion of the moments of consumers' inputs."""

    needs: Needs = ("moments",)

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        """(units,) the sum over the group's consumers of :meth:`value`."""
        moments = statistics.moments
        return sum_over_consumers(group, model, lambda one: self.value(group, one, moments[one.name]), moments)

    def value(self, group: ChannelGroup, consumer: Consumer, moments: ChannelMoments) -> Tensor:
        """(units,) what one consumer adds."""
        raise NotImplementedError


class FLAP(MomentCriterion):
    """S_j = Var(x_j) |W_:j|^2 of every in channel, standardised within the consumer; a unit scores its channels' mean.

    FLAP (An et al., arXiv 2312.11983, "WIFV"): one threshold for all groups; the consumer's bias absorbs the mean of
    the dropped channels, ``compensate="mean"``.

    Args:
        standardise: False does not standardise S.
        code: follow the authors' code: S of heads is squared first, and the standard deviation uses n - 1.
    """

    name = "flap"
    about = About(
        "FLAP (WIFV); the criterion of HARP's and LOP's feed-forward part",
        "arXiv 2312.11983",
        "z-score within the layer of Var(x_j) |W_:j|^2",
        "forward",
        differs="its code squares S of heads (code=True), and its running variance leaves out the first sample; copies "
        "in HARP and CFSP prune feed-forward channels only",
    )
    update = "mean"
    per_cost = False

    def __init__(self, standardise: bool = True, code: bool = False) -> None:
        self.standardise, self.code = standardise, code

    def value(self, group: ChannelGroup, consumer: Consumer, moments: ChannelMoments) -> Tensor:
        """(units,) the mean over the channels of S_j, standardised if requested."""
        fluctuation = moments.variance.cpu() * consumer.square
        if self.code and group.kind in ("heads", "query_heads"):
            fluctuation = fluctuation.square()
        if not self.standardise:
            return fluctuation[consumer.channels].mean(1)
        scores = torch.zeros_like(fluctuation)
        used = consumer.channels.flatten()
        scores[used] = standardised(fluctuation[used], correction=int(self.code))
        return scores[consumer.channels].mean(1)


class WandaSP(MomentCriterion):
    """S_j = sqrt(E x_j^2) sum_i |W_ij| of every in channel, summed over a unit's channels.

    Wanda (Sun et al., arXiv 2306.11695) by columns, the baseline of FLAP's code; equal shares in every group.
    """

    name = "wanda_sp"
    about = About(
        "Wanda-sp",
        "arXiv 2306.11695; code of FLAP",
        "sum over the unit's channels j of sqrt(E x_j^2) sum_i |W_ij|",
        "forward",
        differs="the code takes |x_j|_2 over all tokens, a common factor",
    )
    allocation = "uniform"

    def value(self, group: ChannelGroup, consumer: Consumer, moments: ChannelMoments) -> Tensor:
        """(units,) the sum over the channels of sqrt(E x_j^2) sum_i |W_ij|."""
        rms = (moments.square.cpu() / moments.count).sqrt()
        return (rms * consumer.columns.abs().sum(1))[consumer.channels].sum(1)


class Minitron(MomentCriterion):
    """s_u = |s_c over the unit's channels c|_2, s_c = sqrt(sum over samples of (mean over tokens of |x_c|)^2).

    Minitron (Muralidharan et al., arXiv 2407.14679) and Minitron-SSM (arXiv 2504.11409), as in Model-Optimizer: at the
    input of the second feed-forward layer, of attention's output projection, and of Mamba's. Equal widths: a unit of
    "query_heads" and of Mamba-2's "mixer_heads" is one head of every group, so groups keep equal numbers of heads.
    """

    name = "minitron"
    about = About(
        "Minitron, Minitron-SSM (activations)",
        "arXiv 2407.14679, 2504.11409; code NVIDIA/Model-Optimizer",
        "norm over the unit's channels of sqrt(sum_b (mean_t |x_btc|)^2)",
        "forward",
        differs="its code ranks the heads of each group separately, here a unit is the j-th head of every group; "
        "for Mamba it reads x as in_proj returns it, here it is what out_proj is given",
        missing="hidden size by post-norm activations; channels of Mamba-2's heads; width search and distillation",
    )
    allocation = "equal"

    def value(self, group: ChannelGroup, consumer: Consumer, moments: ChannelMoments) -> Tensor:
        """(units,) s_u."""
        return moments.mean_absolute_square.cpu()[consumer.channels].sum(1).sqrt()


class CFSP(MomentCriterion):
    """Fine score of CFSP (code wyxscir/CFSP): |x_j|_2^power; coarse shares by the angle between a block's ends.

    Args:
        weights: False follows the released code, whose weight terms cancel: each of the three |W| / sum |W| sums to 1
            over the averaged axis, so S_j = (3 / hidden) |x_j|_2^power. True uses |x_j|_2^power times the mean over
            outputs i of |W_ij| / sum_k |W_ik| in the consumer, the term of the paper's relative weights that sees x_j.
        power: exponent of the norm.
    """

    name = "cfsp"
    about = About(
        "CFSP",
        "arXiv 2409.13199; code wyxscir/CFSP",
        "|x_j|_2^power; shares of a sigmoid of the blocks' angular distance",
        "forward",
        kinds="feed-forward channels, heads",
        differs="the weight terms of its code cancel (weights=False, default); weights=True has the paper's",
        missing="LoRA ranks by block importance",
    )
    needs = ("moments", "blocks")
    per_cost = False

    def __init__(self, weights: bool = False, power: float = 1.0) -> None:
        self.weights, self.power = weights, power
        self.allocation = BlockProfile("angle", "sigmoid")

    def value(self, group: ChannelGroup, consumer: Consumer, moments: ChannelMoments) -> Tensor:
        """(units,) the sum over the channels of |x_j|_2^power, weighted if requested."""
        norms = moments.square.cpu().sqrt().pow(self.power)
        if self.weights:
            absolute = consumer.columns.abs()
            norms = norms * (absolute / absolute.sum(0).clamp_min(TINY)).mean(1)
        return norms[consumer.channels].sum(1)
