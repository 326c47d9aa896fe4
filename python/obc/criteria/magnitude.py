"""Criteria from weights alone. Without data, they compare groups only after division by each group's mean."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from obc import ops
from obc.criteria.protocol import About, Criterion, GroupScores, MeasuredCriterion
from obc.criteria.slices import KINDS, slice_weights
from obc.criteria.subject import Subject
from obc.criteria.units import mean_over, relative
from obc.model.arguments import one_of
from obc.model.groups import ChannelGroup
from obc.statistics.results import Statistics


class Random(MeasuredCriterion):
    """S_u uniform in [0, 1), from the seed of ``obc.prune``."""

    name = "random"
    about = About("random", "baseline", "uniform in [0, 1)", "weights", kinds="all")

    def measure(self, subject: Subject) -> GroupScores:
        """(units,) per group, uniform in [0, 1)."""
        return {
            group.name: torch.rand(group.size, generator=subject.generator, device="cpu") for group in subject.groups
        }


class Magnitude(Criterion):
    """S_u = mean over slices m of |W_m,u|_1, or |W_m,u|_2^2, relative to the group's mean.

    Li et al., arXiv 1608.08710, over whole groups of coupled slices as in Torch-Pruning.

    Args:
        power: 1 or 2.

    Raises:
        ValueError: ``power`` is another number.
    """

    def __init__(self, power: int) -> None:
        one_of("power", power, (1, 2))
        self.name, self._moment = f"l{power}", {1: 4, 2: 3}[power]  # type: ignore[misc]
        formula = f"mean over slices of sum |w|^{power}, / group mean"
        self.about = About(f"L{power} magnitude", "arXiv 1608.08710", formula, "weights", kinds=KINDS)  # type: ignore[misc]

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        """(units,) the mean over the group's slices of their norms."""
        return by_weights(group, model, lambda weights: ops.weight_moments(weights, weights)[self._moment])


class BNScale(Criterion):
    """S_u = mean over the group's BatchNorms of |gamma_u| (Network Slimming, Liu et al., arXiv 1708.06519).

    Groups without a BatchNorm have no score.
    """

    name = "bn_scale"
    about = About(
        "Network Slimming",
        "arXiv 1708.06519",
        "mean over BatchNorms of |gamma_u|",
        "weights",
        kinds="channels behind a BatchNorm",
        missing="the L1 penalty on gamma during training",
    )

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        """(units,) the mean over the group's BatchNorms of |gamma|; None without one."""
        values, modules = [], dict(model.named_modules())
        for part in group.slices:
            module = modules.get(part.module)
            if isinstance(module, _BatchNorm) and module.affine:
                values.append(module.weight.detach()[part.channels.to(module.weight.device)].abs().mean(1))
        return mean_over(values)


class FPGM(Criterion):
    """S_u = mean over producers m of sum_v |W_m,u - W_m,v|_2, relative to the group's mean.

    Distance to the geometric median, He et al., arXiv 1811.00250.
    """

    name = "fpgm"
    about = About(
        "FPGM", "arXiv 1811.00250", "mean over producers of sum_v |W_u - W_v|, / group mean", "weights", KINDS
    )

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        """(units,) the sum of distances to all other units, averaged over producers."""
        return by_weights(group, model, lambda weights: torch.cdist(weights, weights).sum(1), producers=True)


class WHC(Criterion):
    """S_u = mean over producers m of |W_u| sum_(v != u) |W_v| (1 - |cos(W_u, W_v)|), relative to the group's mean.

    Weighted Hybrid Criterion, Chen et al., arXiv 2302.08185.
    """

    name = "whc"
    formula = "mean over producers of |W_u| sum_v |W_v| (1 - |cos(W_u, W_v)|), / group mean"
    about = About("WHC", "arXiv 2302.08185", formula, "weights", KINDS)

    def score(self, group: ChannelGroup, statistics: Statistics, model: nn.Module) -> Tensor | None:
        """(units,) sum over v of |W_u| |W_v| - |<W_u, W_v>|, averaged over producers."""

        def hybrid(weights: Tensor) -> Tensor:
            norms = weights.norm(dim=1)
            products = norms[:, None] * norms - (weights @ weights.T).abs()
            return products.fill_diagonal_(0).sum(1)

        return by_weights(group, model, hybrid, producers=True)


def by_weights(
    group: ChannelGroup, model: nn.Module, value: Callable[[Tensor], Tensor], producers: bool = False
) -> Tensor | None:
    """The mean of ``value``, a function of (units, entries), over the layers' slices, divided by the group's mean."""

    found = [one for one in slice_weights(group, model) if not (producers and one.part.side == "in")]
    return relative(mean_over(value(one.by_unit(one.weight).contiguous()) for one in found))


class IntraFusion(Magnitude):
    """Chooses the kept units by L1 magnitude, as in the paper's experiments; any criterion would work."""

    update = "fusion"

    def __init__(self) -> None:
        super().__init__(1)
        self.name = "intra_fusion"  # type: ignore[misc]
        self.about = About(  # type: ignore[misc]
            "Intra-Fusion",
            "arXiv 2402.07839; code alexandertheus/Intra-Fusion",
            "L1 magnitude; removed units are fused into kept ones by optimal transport of weights",
            "weights",
            differs="its code multiplies outputs by T itself, so that they grow with what they fuse: outputs='sum'",
            missing="merging of BatchNorms (its code merges them before; torch.nn.utils.fusion does), Gaussian "
            "mixtures as targets, fusion during training",
        )
